"""All ranks of a job together: what each has, and what one does for all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megalite.error import UserError, told_to_users

Result = TypeVar("Result")


class JobError(UserError):
    """A user's mistake that shows when the ranks come together."""


def gather(value: Any) -> list[Any]:
    """Every rank's object, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank_0(rank: int, action: Callable[[], Result]) -> Result:
    """What an action gives on rank 0, on every rank; a user's mistake too, as the job's and not a rank's."""
    value, mistake = None, None
    if rank == 0:
        try:
            value = action()
        except Exception as error:
            mistake = told_to_users(error)
            if mistake is None:
                raise
    value, mistake = gather((value, mistake))[0]
    if mistake is not None:
        raise JobError(mistake)
    return value
