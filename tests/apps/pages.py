"""Reading HTML pages in tests: whether they are well formed, and what they refer to."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from xml.etree import ElementTree

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Parses a page and fails on tags that do not match; collects headings, text, tables and images."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.words = ""
        assert text.lower().startswith("<!doctype html>")
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"<{tag}> has an attribute twice"
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [value for name, value in attrs if name in ("href", "action", "srcset", "poster", "data")]
        self.sources += [attributes["src"]] if "src" in attributes else []
        assert tag != "img" or attributes.get("alt"), "an image without words for those who cannot see it"
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2"):
            self.headings.append("")
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings[-1] += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data
        if "style" not in self.open:
            self.words += data

    def check_self_contained(self) -> None:
        """Nothing comes from elsewhere, every link leads to a part of the page, every image is whole."""
        assert len(self.ids) == len(set(self.ids))
        assert all(link.startswith("#") and link[1:] in self.ids for link in self.links), self.links
        for source in self.sources:
            kind, data = source.split(",", 1)
            content = base64.b64decode(data, validate=True)
            if kind == "data:image/svg+xml;base64":
                assert ElementTree.fromstring(content).tag.endswith("svg")
            else:
                assert kind == "data:image/png;base64"
                assert content.startswith(b"\x89PNG")
                assert b"IEND" in content[-12:]
