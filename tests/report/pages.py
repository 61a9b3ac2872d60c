"""Reading a page as a browser would: its tables, its labels, and whatever it would load."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from mbridge_prune.report.page import write_report

VOID = ("meta", "br", "wbr", "hr", "col", "input", "img", "link")
DASH = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


class Page(HTMLParser):
    """Parses strictly: a tag that is closed wrongly is an error.

    Attributes:
        tables: caption -> rows of texts, the head first.
        attributes: (tag, name, value) of every attribute.
        text: all that is shown.
    """

    def __init__(self, content: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text, self._caption, self._rows = "", "", []
        self.feed(content)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._caption, self._rows = "", []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()
        if tag == "table":
            assert self._caption not in self.tables, f"two tables named {self._caption}"
            self.tables[self._caption] = self._rows

    def handle_data(self, data):
        data = data.replace("\N{NO-BREAK SPACE}", " ").replace("\N{WORD JOINER}", "")
        if self.open and self.open[-1] in ("style", "script"):
            return
        self.text += data
        if "caption" in self.open:
            self._caption += data
        elif "th" in self.open or "td" in self.open:
            self._rows[-1][-1] += data

    def rows(self, caption: str) -> dict[str, list[str]]:
        """First cell -> the others."""
        return {row[0]: row[1:] for row in self.tables[caption][1:]}

    def loads(self) -> list[str]:
        """Everything that a browser would fetch or run."""
        names = (
            "src",
            "srcset",
            "href",
            "data",
            "action",
            "poster",
            "background",
            "xlink:href",
            "formaction",
        )
        found = [f"{t} {n}={v}" for t, n, v in self.attributes if n in names and not v.startswith("#")]
        return found + [f"{t} {n}" for t, n, v in self.attributes if n.startswith("on") or "url(" in v]


def read_page(folder: Path) -> Page:
    """A run's page, written anew."""
    return Page(write_report(folder).read_text(encoding="utf-8"))
