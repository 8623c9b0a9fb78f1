"""The page around the parts: one file, which loads nothing."""

import base64
import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

from fp8pack.report.page.parts import text

_PACKAGES = ("fp8pack", "numpy", "torch", "transformers")


def document(title: str, sections: list[str], command: str) -> str:
    """Return a page; `command`: what wrote it."""
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    written = f"<pre><code>{text(command)}</code></pre>" if command else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{_resource('page.css')}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{text(title)}</h1>\n"
        + "\n".join(part for part in sections if part)
        + f"\n</main>\n<footer><h2>Written by</h2>{written}"
        f"<p>{text(', '.join(_versions()))}</p></footer>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _versions() -> list[str]:
    found = [f"Python {platform.python_version()}", platform.machine()]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


@cache
def _resource(name: str) -> str:
    return (files("fp8pack.report.page") / name).read_text(encoding="utf-8")
