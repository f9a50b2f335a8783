"""Mistakes that their reader can mend. They are told in one line; every other error keeps its traceback."""

import sys
from collections.abc import Callable

from megalite.exit_status import FAILED, MISTAKE


class UserError(ValueError):
    """What is wrong, with both values, and the remedy: one line for a person. Base of all such errors.

    exit_status: of a job whose ranks all meet it.
    """

    exit_status = MISTAKE


class UnusableRecordError(UserError):
    """Why one record among many cannot be learnt from: a reason to count it under, and a detail."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


def told_to_users(error: BaseException) -> str | None:
    """The one line to tell of an error; None when it is ours to mend, and its traceback must be seen.

    An OSError is told as well: a file, a disk or a network that the user named, in the system's words.
    """
    if isinstance(error, OSError):
        said = error.strerror or str(error)  # without Python's number
        return f"{error.filename}: {said}" if error.filename and error.strerror else said
    return str(error) if isinstance(error, UserError) else None


def exit_status_of(error: BaseException) -> int:
    """Of a job whose ranks all meet it."""
    return error.exit_status if isinstance(error, UserError) else FAILED


def run_command(command: Callable[[], int | None], interrupted: str = "nothing was written") -> int:
    """The exit status of a command: its own, or 2 after a user's mistake and 130 after an interruption.

    interrupted: what is left then, in words. Every other error is raised on, for its traceback to be seen.
    """
    try:
        return command() or 0
    except KeyboardInterrupt:
        print(f"error: interrupted: {interrupted}", file=sys.stderr)
        return 130
    except Exception as error:
        line = told_to_users(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
