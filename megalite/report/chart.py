"""Charts as Vega-Lite specifications. Colours are names that the page's style sheet gives a value.

https://vega.github.io/vega-lite/docs is the reference. So a chart is dark or light, and black on white in
print, without being drawn anew.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megalite.report.content import Chart
from megalite.report.curve import Point

Spec = dict[str, Any]
NUM_COLOURS = 8
DASHES = [[1, 0], [5, 3], [2, 2], [8, 3, 2, 3]]
LINE_HEIGHT, BAR_HEIGHT, CELL_HEIGHT = 240, 26, 12  # pixels
LEGEND = {"columns": {"expr": "width < 480 ? 1 : 2"}, "symbolOpacity": 1}  # a phone has room for one
INK, GRID = "var(--ink)", "var(--grid)"
THEME: Spec = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": INK,
        "titleColor": INK,
        "gridColor": GRID,
        "domainColor": GRID,
        "tickColor": GRID,
        "titleFontWeight": "normal",
        "labelLimit": 140,
    },
    "legend": {"labelColor": INK, "titleColor": INK, "orient": "bottom", "labelLimit": 240},
    "header": {"labelColor": INK, "titleColor": INK},
    "title": {"color": INK},
    "range": {"category": [f"var(--series-{number})" for number in range(1, NUM_COLOURS + 1)]},
}


class Series(NamedTuple):
    """A curve: its run, by which it has its colour, and which of that run's curves it is, by dashes.

    dotted: each point is marked, as of something that is measured now and then.
    """

    run: str
    points: Sequence[Point]
    curve: str = "training"
    dotted: bool = False


class Bar(NamedTuple):
    """A piece of a bar: from begin to end, in the line that `row` names, in the colour of `kind`."""

    row: str
    begin: float
    end: float
    kind: str
    text: str


def line_chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    zero: bool = False,
    marks: Mapping[int, str] | None = None,
    number_format: str = "~s",
) -> Chart:
    """Curves over optimizer steps.

    unit: of the numbers, the title of their axis. zero: whether the axis begins at 0.
    marks: step -> what happened there, an upright line each.
    number_format: of d3, for the axis.
    """
    rows = [
        {"step": p.step, "value": p.mean, "least": p.least, "largest": p.largest}
        | {"run": one.run, "curve": one.curve, "dotted": one.dotted or len(one.points) < 2}
        for one in series
        for p in one.points
    ]
    x = {"field": "step", "type": "quantitative", "title": "optimizer step", "axis": {"tickMinStep": 1}}
    y: Spec = {"field": "value", "type": "quantitative", "title": unit, "scale": {"zero": zero}}
    y["axis"] = {"format": number_format, "tickCount": 6}
    colours = _channel("run", [one.run for one in series])
    dashes = _channel("curve", [one.curve for one in series], DASHES)
    layers: list[Spec] = []
    if any(point.least < point.largest for one in series for point in one.points):
        band = {"y": y | {"field": "least"}, "y2": {"field": "largest"}, "detail": {"field": "curve"}}
        layers.append({"mark": {"type": "area", "opacity": 0.2, "aria": False}, "encoding": band})
    if marks:
        layers.append(_upright(marks))
    layers.append(
        {
            "mark": {"type": "line", "strokeWidth": 1.6, "aria": False},
            "encoding": {"y": y, "strokeDash": dashes},
        }
    )
    layers.append(_seen_points(y))
    spec = {
        "height": LINE_HEIGHT,
        "data": {"values": rows},
        "encoding": {"x": x | {"scale": {"nice": False}}, "color": colours},
        "layer": layers,
    }
    return Chart(title, f"{title}, {unit}. {_in_words(series)}", spec)


def _upright(marks: Mapping[int, str]) -> Spec:
    """Lines at steps, with what happened there when a reader points at them."""
    return {
        "data": {"values": [{"step": step, "what": what} for step, what in marks.items()]},
        "mark": {"type": "rule", "strokeDash": [3, 3], "aria": False},
        "encoding": {
            "x": {"field": "step", "type": "quantitative"},
            "color": {"value": INK},
            "tooltip": [{"field": "step", "title": "step"}, {"field": "what", "title": "what"}],
        },
    }


def _channel(field: str, values: Sequence[str], dashes: Sequence[Sequence[int]] = ()) -> Spec:
    """What tells curves apart: colours, or dashes if there are any; a legend where there are several."""
    domain = list(dict.fromkeys(values))
    scale = {"domain": domain} | ({"range": dashes} if dashes else {})
    legend = LEGEND | ({"symbolType": "stroke", "symbolStrokeColor": INK} if dashes else {})
    shown = legend if len(domain) > 1 else None
    return {"field": field, "type": "nominal", "title": None, "scale": scale, "legend": shown}


def _seen_points(y: Spec) -> Spec:
    """Points that are seen where a series is dotted, and where a reader points; then with their numbers."""
    tooltip = [{"field": name, "title": name} for name in ("run", "curve", "step")]
    tooltip.append({"field": "value", "title": "value", "format": ".6~g"})
    near = {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"}
    return {
        "params": [{"name": "near", "select": near}],
        "mark": {"type": "point", "filled": True, "size": 36, "aria": False},
        "encoding": {
            "y": y,
            "tooltip": tooltip,
            "opacity": {
                "condition": [
                    {"param": "near", "empty": False, "value": 1},
                    {"test": "datum.dotted", "value": 1},
                ],
                "value": 0,
            },
        },
    }


def _in_words(series: Sequence[Series]) -> str:
    told = [
        f"{one.run}, {one.curve}: {one.points[0].mean:.6g} at step {one.points[0].step:,}, "
        f"{one.points[-1].mean:.6g} at step {one.points[-1].step:,}"
        for one in series
        if one.points
    ]
    return "; ".join(told) + "."


def bar_chart(title: str, unit: str, bars: Sequence[Bar], description: str, kinds: Sequence[str]) -> Chart:
    """Bars from left to right, a line for each row. kinds: in the order of their colours."""
    rows = list(dict.fromkeys(bar.row for bar in bars))
    values = [bar._asdict() for bar in bars]
    tooltip = [{"field": "text", "title": "what"}, {"field": "row", "title": "of"}]
    tooltip += [{"field": name, "format": ".4~s"} for name in ("begin", "end")]
    spec: Spec = {
        "height": BAR_HEIGHT * len(rows),
        "data": {"values": values},
        "mark": {"type": "bar", "stroke": "var(--paper)", "strokeWidth": 0.5, "aria": False},
        "encoding": {
            "x": {"field": "begin", "type": "quantitative", "title": unit, "axis": {"format": "~s"}},
            "x2": {"field": "end"},
            "y": {"field": "row", "type": "nominal", "title": None, "sort": rows},
            "color": _channel("kind", kinds),
            "tooltip": tooltip,
        },
    }
    return Chart(title, description, spec, wide=True)


def heat_map(title: str, values: Sequence[Mapping[str, Any]], num_rows: int, description: str) -> Chart:
    """Cells from `begin` to `end` (optimizer steps) in the line of an `expert`, coloured by their `load`."""
    spec: Spec = {
        "height": CELL_HEIGHT * num_rows,
        "data": {"values": list(values)},
        "mark": {"type": "rect", "aria": False},
        "encoding": {
            "x": {"field": "begin", "type": "quantitative", "title": "optimizer step"},
            "x2": {"field": "end"},
            "y": {"field": "expert", "type": "ordinal", "title": "expert", "axis": {"labelOverlap": True}},
            "color": {
                "field": "load",
                "type": "quantitative",
                "title": "load, 1 = balance",
                "scale": {"scheme": "blueorange", "domain": [0, 1, 2], "domainMid": 1, "clamp": True},
            },
            "tooltip": [{"field": "expert"}, {"field": "end", "title": "to step"}, {"field": "load"}],
        },
    }
    spec["encoding"]["x"]["scale"] = {"zero": False, "nice": False}
    return Chart(title, description, spec)
