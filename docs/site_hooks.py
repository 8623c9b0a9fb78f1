"""For mkdocs: a link that leaves docs/ works in the repository, and stands as its path in the site."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page whose links to files outside docs/ are text: what they are called, and where they are."""

    def plain(match: re.Match[str]) -> str:
        target = (DOCS / page.file.src_uri).parent / match[2]
        if target.resolve().is_relative_to(DOCS.resolve()):
            return match[0]
        path = target.resolve().relative_to(DOCS.parent.resolve())
        return match[1] if match[1].strip("`") == str(path) else f"{match[1]} (`{path}`)"

    return LINK.sub(plain, markdown)
