"""The page that a web server shows for a folder: its links are the folder's files."""

from __future__ import annotations

import posixpath
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit


class _Links(HTMLParser):
    """Collects where the anchors of a page lead."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def links(page: str) -> tuple[list[str], list[str]]:
    """Give the names of files and of folders that a page links to, of its own folder only."""
    parser = _Links()
    parser.feed(page)
    files: set[str] = set()
    folders: set[str] = set()
    for href in parser.found:
        parts = urlsplit(href)
        name = posixpath.normpath(unquote(parts.path)) if parts.path else "."
        is_below = not (parts.scheme or parts.netloc or parts.query or "/" in name)
        if is_below and not name.startswith(".."):
            (folders if parts.path.endswith("/") else files).add(name)
    return sorted(files - {"."}), sorted(folders - {"."})
