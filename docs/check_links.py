"""Ask every external link of README.md and docs/ whether it answers; those that do not are printed."""

import re
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def problem(url: str) -> str | None:
    """Return why a link does not answer, None if it does."""
    request = urllib.request.Request(url, headers={"User-Agent": "fp8pack-docs"})
    try:
        with urllib.request.urlopen(request, timeout=20):
            return None
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        return str(error)


if __name__ == "__main__":
    links = {url for page in PAGES for url in re.findall(r"\]\((https?://[^)\s]+)\)", page.read_text(encoding="utf-8"))}
    broken = {url: reason for url in sorted(links) if (reason := problem(url))}
    for url, reason in broken.items():
        print(f"{url}: {reason}")
    sys.exit(1 if broken else 0)
