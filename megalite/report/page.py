"""A page of sections as one file of HTML, which needs nothing beside it."""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from megalite.report.bundle import javascript
from megalite.report.chart import THEME
from megalite.report.configuration import configuration
from megalite.report.content import ReportError, Section
from megalite.report.data import data
from megalite.report.evaluation import evaluation
from megalite.report.events import events
from megalite.report.experts import experts
from megalite.report.memory import memory
from megalite.report.run import Run
from megalite.report.speed import speed
from megalite.report.timeline import timeline
from megalite.report.training import overview, training

SECTIONS = (overview, training, speed, memory, timeline, events, experts, evaluation, configuration, data)


def format_page(runs: Sequence[Run], written_at: str) -> str:
    """The page of one run or of several side by side. written_at: when, in words."""
    title = "Run " + runs[0].name if len(runs) == 1 else "Runs " + ", ".join(run.name for run in runs)
    return render(title, written_at, [section(runs) for section in SECTIONS])


def render(title: str, written_at: str, sections: Sequence[Section]) -> str:
    """These sections as HTML; every text is escaped. ReportError where Jinja is not installed."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ModuleNotFoundError:
        raise ReportError("jinja2 is not installed: pip install 'megalite[report]'") from None
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["script_json"] = script_json
    template = environment.from_string(_asset("page.html.jinja"))
    assets = {"style": _asset("page.css"), "drawing": _asset("page.js"), "library": javascript()}
    return template.render(title=title, written_at=written_at, sections=sections, theme=THEME, **assets)


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends that, or begins a comment."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return files("megalite.report").joinpath(name).read_text(encoding="utf-8")
