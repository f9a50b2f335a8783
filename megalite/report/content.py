"""What a page is made of: sections of tables, charts and lines of text. No HTML, and no run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from megalite.error import UserError


class ReportError(UserError):
    """A report that cannot be written as it is asked for."""


@dataclass(frozen=True)
class Note:
    """A line of text."""

    kind: ClassVar[str] = "note"
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells as people read them; the first cell of a row names it.

    folded: whether it is shown only when a reader opens it.
    """

    kind: ClassVar[str] = "table"
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite specification without a size, its title, and what it shows in words.

    wide: whether it needs the whole width of the page.
    """

    kind: ClassVar[str] = "chart"
    title: str
    description: str
    spec: dict[str, Any]
    wide: bool = False


@dataclass
class Section:
    """A part of the page, under a heading."""

    title: str
    items: list[Note | Table | Chart] = field(default_factory=list)
