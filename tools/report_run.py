"""Write a page on one run, or on several side by side: one file of HTML that needs no network."""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from megalite.error import run_command
from megalite.files import write_text
from megalite.report.page import format_page
from megalite.report.run import read_runs

EPILOG = """\
The page has the curves of training and validation, speed and MFU with their formula, memory, the timeline
of a step, events, experts, evaluations, the configuration and where it differs from the default, and the
data. It reads what the folders hold at the moment, also of a run that goes on, and says what they lack. It
needs vl-convert-python and jinja2: pip install 'megalite[report]'.

examples:
  python tools/report_run.py runs/first
  python tools/report_run.py runs/first runs/second --output comparison.html
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="folder that a run wrote")
    parser.add_argument(
        "--output", type=Path, help="page to write (default: report.html in the first RUN_DIR)"
    )
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.run_dirs[0] / "report.html"
    return run_command(lambda: report(arguments.run_dirs, output))


def report(run_dirs: list[Path], output: Path) -> None:
    """Write the page on these runs to `output`, complete or not at all."""
    runs = read_runs(run_dirs)
    page = format_page(runs, f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    write_text(output, page)
    steps = ", ".join(f"{run.name} ({len(run.rows):,} steps)" for run in runs)
    print(f"wrote {output}, {len(page) / 1e6:.1f} MB: {steps}")


if __name__ == "__main__":
    sys.exit(main())
