"""An error on one rank becomes an error on all, so that none is left waiting in a collective."""

from collections.abc import Callable
from typing import Any, TypeVar

from megalite.checkpoint.format import CheckpointError
from megalite.error import told_to_users

Gather = Callable[[Any], list[Any]]  # all-gathers a Python object over the ranks, in rank order
Result = TypeVar("Result")


def alone(value: Any) -> list[Any]:
    """The gather of a single process."""
    return [value]


def on_all_ranks(gather: Gather, action: Callable[[], Result]) -> Result:
    """Run an action on every rank; what it returned on this one.

    When it raised on any rank, every rank raises CheckpointError, which names the first that failed. Only a
    rank whose error is no user's mistake raises that error itself: its traceback must be seen.
    """
    outcome: list[Result] = []
    failure: Exception | None = None
    try:
        outcome.append(action())
    except Exception as error:  # whatever it is, the other ranks must hear of it
        failure = error
    everyone = gather(failure and (told_to_users(failure) or f"{type(failure).__name__}: {failure}"))
    if failure and told_to_users(failure) is None:
        raise failure
    failures = [(rank, text) for rank, text in enumerate(everyone) if text is not None]
    if not failures:
        return outcome[0]
    rank, text = failures[0]
    who = f"rank {rank}: " if len(everyone) > 1 else ""
    more = f" (and on {len(failures) - 1} more ranks)" if len(failures) > 1 else ""
    raise CheckpointError(f"{who}{text}{more}") from failure
