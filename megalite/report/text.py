"""Numbers as people read them."""

from datetime import UTC, datetime
from typing import Any


def number(value: float | None, form: str = ",.4g", unit: str = "") -> str:
    """A number and its unit; a dash where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"


def at_step(found: tuple[int, float] | None) -> str:
    """A number and the step that it is of."""
    return "-" if found is None else f"{found[1]:.4f} (step {found[0]:,})"


def time_of(seconds: float | None) -> str:
    """A moment, in universal time."""
    return "-" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def plain(value: Any) -> str:
    """A setting as YAML writes it, nearly."""
    named = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return named[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(plain(one) for one in value) + "]"
    return str(value)
