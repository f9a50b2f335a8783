"""How far a run is: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}|{postfix} | {elapsed}<{remaining}"


class Progress:
    """Shows each step of a run on `stream`.

    On a terminal, a bar that is redrawn at every step; otherwise, or without `bar`, one line every
    `every_steps` steps, and for the last step and every validation.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        last_step: int = 0,
        every_steps: int = 1,
        bar: bool = True,
        stream: TextIO | None = None,
    ):
        self._num_steps = num_steps
        self._every_steps = every_steps
        self._stream = stream or sys.stderr
        self._first: tuple[int, float] | None = None  # step and time of the first step that was shown
        self._bar: tqdm | None = None
        if bar and self._stream.isatty():
            self._bar = tqdm(
                total=num_steps,
                initial=last_step,
                desc="step",
                bar_format=BAR_FORMAT,
                file=self._stream,
                dynamic_ncols=True,
            )

    def show(self, row: dict[str, Any]) -> None:
        """Show one row of metrics."""
        step = row["step"]
        seconds_left = self._seconds_left(step, row["step_seconds"])
        if self._bar is not None:
            self._bar.set_postfix_str(" | ".join(describe(row)), refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()
        elif step % self._every_steps == 0 or step == self._num_steps or "validation_loss" in row:
            where = f"step {step}/{self._num_steps}"
            left = f"{seconds_in_words(seconds_left)} left" if step < self._num_steps else "done"
            print(" | ".join([where, *describe(row), left]), file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _seconds_left(self, step: int, step_seconds: float) -> float:
        """From the mean pace, validation and checkpoints included, since the first step, which warms up."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        pace = (now - first_time) / (step - first_step) if step > first_step else step_seconds
        return pace * (self._num_steps - step)


def describe(row: dict[str, Any]) -> list[str]:
    """The numbers of one row of metrics as people read them."""
    numbers = [
        f"loss {row['loss']:.4f}{rewards_in_words(row)}",
        f"grad norm {row['grad_norm']:.3f}",
        f"lr {row['learning_rate']:.2e}",
        f"{row['tokens_per_second']:,.0f} tokens/s",
        f"MFU {row['mfu']:.1%}",
    ]
    if "validation_loss" in row:
        rewards = rewards_in_words(row, "validation_")
        numbers.insert(1, f"validation loss {row['validation_loss']:.4f}{rewards}")
    if "expert_largest_violation" in row:
        numbers.insert(-2, f"expert violation {row['expert_largest_violation']:.2f}")
    return numbers


def rewards_in_words(row: dict[str, Any], prefix: str = "") -> str:
    """What a row of a preference run tells of its answers, in brackets; nothing for other rows."""
    words = {"margins": "margin {:.4f}", "accuracies": "accuracy {:.1%}"}
    numbers = {text: row.get(f"{prefix}rewards/{name}") for name, text in words.items()}
    told = [text.format(number) for text, number in numbers.items() if number is not None]
    return f" ({', '.join(told)})" if told else ""


def seconds_in_words(seconds: float) -> str:
    """Two units are enough: "41.3 s", "3 min 20 s", "5 h 12 min", "2 d 7 h"."""
    if seconds < 59.95:  # what rounds to 60.0 is a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
