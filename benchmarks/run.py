"""Run the benchmarks, side by side with peers: prints a table, draws a plot and writes docs/benchmarks.md.

    python -m benchmarks.run              # all, as `make bench`
    python -m benchmarks.run data_index   # one; the other sections of the page stay as they are
    python -m benchmarks.run --json F     # also for programs to read

A benchmark is a file benchmarks/NAME_benchmark.py. Its docstring's first paragraph opens the section on the
page; TITLE and PEER name it and what it is compared with; measure() returns a list of Measurement. One that
draws a plot itself says where in PLOT.
"""

import argparse
import importlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from benchmarks.measurement import Measurement

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
SUFFIX = "_benchmark"
INTRODUCTION = """\
# Benchmarks

Written by `make bench`. Each row was measured with its peer in the same run, taking turns; times are medians.
The last column says how many times better megalite is: below 1 it is worse. Brackets hold the middle half of
the rounds.
"""


def main(argv: list[str] | None = None) -> int:
    """Run what was asked for; returns the exit status."""
    known = sorted(path.stem.removesuffix(SUFFIX) for path in FOLDER.glob(f"*{SUFFIX}.py"))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"benchmarks to run: {', '.join(known)}")
    parser.add_argument("--page", type=Path, default=PAGE, help="page to write (default: docs/benchmarks.md)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements here")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in known:
            print(f"error: no benchmark {name!r}: known are {', '.join(known)}", file=sys.stderr)
            return 2
    found = {}
    for name in arguments.names or known:
        module = importlib.import_module(f"benchmarks.{name}{SUFFIX}")
        print(f"{module.TITLE} ...", file=sys.stderr, flush=True)
        try:
            measurements = module.measure()
        except ModuleNotFoundError as error:
            print(f"{module.TITLE}: left out, {error.name} is not installed", file=sys.stderr)
            continue
        print(f"\n{module.TITLE}, against {module.PEER}\n\n{table(measurements, module.PEER)}\n", flush=True)
        publish(arguments.page, name, module, measurements)
        found[name] = [{**m._asdict(), "advantage": m.advantage} for m in measurements]
        if arguments.json:  # after each, since all take hours
            told = json.dumps({"machine": _machine(), **found}, indent=2)
            arguments.json.write_text(told + "\n", encoding="utf-8")
    print(f"wrote {arguments.page}")
    return 0


def table(measurements: list[Measurement], peer: str) -> str:
    """Measurements as a Markdown table."""
    rows = [["", "megalite", peer, "unit", "times better"]]
    for m in measurements:
        ours, theirs, better = _number(m.megalite), "-", "-"
        if m.peer is None:
            ours += _between(m.spread, _number)
        else:
            theirs, better = _number(m.peer), f"{m.advantage:.2f}" + _between(m.spread, "{:.2f}".format)
        rows.append([m.name, ours, theirs, m.unit, better])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|---:|---:|---|---:|", *lines[1:]])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _between(spread: tuple[float, float] | None, number: Callable[[float], str]) -> str:
    return f" ({' to '.join(map(number, spread))})" if spread else ""


def publish(page: Path, name: str, module: ModuleType, measurements: list[Measurement]) -> None:
    """Put a benchmark's section and plot in place of its former ones."""
    drawn: Path | None = getattr(module, "PLOT", None)  # by itself
    plot = drawn or page.parent / "images" / f"{name}{SUFFIX}.png"
    opening = (module.__doc__ or "").split("\n\n")[0].strip()
    parts = [f"## {module.TITLE}", opening, table(measurements, module.PEER)]
    if any(m.peer is not None for m in measurements):
        if drawn is None:
            draw(plot, module, measurements)
        parts.append(f"![{module.TITLE}](images/{plot.name})")
    parts.append(f"{_machine()}; `python -m benchmarks.run {name}`.")
    sections = _read_sections(page)
    sections[module.TITLE] = "\n\n".join(parts)
    ordered = [sections[title] for title in sorted(sections)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join([INTRODUCTION.rstrip(), *ordered]) + "\n", encoding="utf-8")


def _read_sections(page: Path) -> dict[str, str]:
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]
    return {section.splitlines()[0].removeprefix("## "): section.strip() for section in sections}


def draw(path: Path, module: ModuleType, measurements: list[Measurement]) -> None:
    """A bar per measurement: how many times better than the peer, whose line is 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [(m.name, m.advantage) for m in reversed(measurements) if m.advantage is not None]
    names, advantages = [name for name, _ in shown], [advantage for _, advantage in shown]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.45 * len(shown)), layout="constrained")
    bars = axes.barh(names, advantages, color="#4477aa")
    axes.bar_label(bars, fmt="%.2f", padding=3, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel(f"times better than {module.PEER}")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _machine() -> str:
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        model = names[0] if names else model
    return f"{os.cpu_count()} cores of {model}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
