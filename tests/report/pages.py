"""A page taken apart again by Python's own parser: what it loads, shows and draws."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link", "img", "br", "hr", "input", "source"}


@dataclass
class Page(HTMLParser):
    """Of a page: its tables by caption, specifications by title, notes, scripts, and what it would load."""

    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    charts: dict[str, dict[str, Any]] = field(default_factory=dict)
    descriptions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    open_tags: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, text: str) -> "Page":
        page = cls()
        HTMLParser.__init__(page)
        page.text, page.title = "", ""
        page.feed(text)
        page.close()
        page.mistakes += [f"<{tag}> is never closed" for tag in page.open_tags]
        return page

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.loaded += [
            value or "" for name, value in attributes if name in ("src", "srcset", "data", "poster")
        ]
        if tag in ("link", "iframe", "object", "embed", "base"):
            self.loaded.append(tag)
        if tag == "a" and not (named.get("href") or "").startswith("#"):
            self.loaded.append(str(named.get("href")))
        self.mistakes += [f"<{tag} {name}>" for name in named if name.startswith("on")]
        if tag not in VOID:
            self.open_tags.append(tag)
        if tag == "tr":
            self.row: list[str] = []
        if tag == "table":
            self.rows: list[list[str]] = []
        if "aria-label" in named:
            self.descriptions.append(named["aria-label"] or "")
        self.text = ""

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        if not self.open_tags or self.open_tags.pop() != tag:
            self.mistakes.append(f"</{tag}> ends another element")
        if tag in ("td", "th"):
            self.row.append(self.text)
        elif tag == "tr":
            self.rows.append(self.row)
        elif tag == "caption":
            self.caption = self.text
        elif tag == "figcaption":
            self.title = self.text
        elif tag == "table":
            self.tables[self.caption] = self.rows
        elif tag == "p":
            self.notes.append(self.text)
        elif tag == "script":
            self.scripts.append(self.text)
            if self.title and "figure" in self.open_tags:
                self.charts[self.title] = json.loads(self.text)
        self.text = ""

    def cells(self, caption: str) -> dict[str, list[str]]:
        """The first cell of each row of a table -> the others."""
        return {row[0]: row[1:] for row in self.tables[caption]}

    def points(self, title: str, curve: str = "training") -> dict[str, list[tuple[int, float]]]:
        """run -> its steps and numbers in a chart."""
        found: dict[str, list[tuple[int, float]]] = {}
        for value in self.charts[title]["data"]["values"]:
            if value["curve"] == curve:
                found.setdefault(value["run"], []).append((value["step"], value["value"]))
        return found
