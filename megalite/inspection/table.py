"""Facts as people read them: columns, sizes, ages; and as machines do."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

Facts = dict[str, Any]  # JSON-able, but for numbers that are not finite


def aligned(rows: Sequence[Sequence[str]], sides: str) -> Iterator[str]:
    """Lines of columns two spaces apart; sides: "l" or "r" for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, sides, strict=True)
        yield "  ".join(cell.ljust(n) if side == "l" else cell.rjust(n) for cell, n, side in cells).rstrip()


def bytes_in_words(num_bytes: float) -> str:
    """Three digits or four, in powers of 1000: "512 B", "1.31 MB", "12.4 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB" if num_bytes < 999.5 else f"{num_bytes:,.0f} TB"


def as_json(facts: Any) -> str:
    """A JSON text; numbers that are not finite are texts in it."""
    return json.dumps(_plain(facts), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
