"""Train with a rank 1 that gets stuck in its sixth step: `stuck.py PLACE ...`, for the tests of hangs.

PLACE "reading" reads a pipe that nobody writes, "computing" loops for ever in Python. Rank 0 is slow to save.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed is imported, as the launcher does

from megalite.data.loader import SampleLoader
from megalite.training.checkpoints import Checkpoints
from megalite.training.command import end, launch
from megalite.training.trainer import StageTrainer
from megalite.watch import stacks

STUCK_STEP, SAVED_STEP = 6, 2
PIPE = "pipe"  # in the working folder
SLOW_SAVE_SECONDS = 25.0


def read_pipe() -> None:
    Path(PIPE).read_bytes()


def loop() -> None:
    while True:
        pass


def before(owner: type, method: str, number: int, action: Callable[[], None]) -> None:
    """Do something before the call of so high a number of a method, in this process."""
    original, calls = getattr(owner, method), 0

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return original(*args, **kwargs)

    setattr(owner, method, replaced)


def main(argv: list[str]) -> int:
    stacks.DEBUGGERS = ()  # they take long, and are tested elsewhere
    # The deepspeed launcher puts --local_rank before our arguments.
    place = next(argument for argument in argv if argument in ("reading", "computing"))
    if os.environ["RANK"] == "0":
        before(Checkpoints, "save", 1, lambda: time.sleep(SLOW_SAVE_SECONDS))
    elif place == "reading":
        before(SampleLoader, "batch", STUCK_STEP, read_pipe)
    else:
        before(StageTrainer, "_loss_gradient", STUCK_STEP, loop)
    return launch(__doc__, "pretrain", [argument for argument in argv if argument != place])


if __name__ == "__main__":
    end(main(sys.argv[1:]))
