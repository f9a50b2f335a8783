"""What a runner tells of a step while it walks through it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from megalite.pipeline.actions import Action

Lane = Literal["compute", "wait", "post", "update"]
"""compute: a stage's forward, or a part of its backward. wait: for the tensor that the action needs, or,
without an action, until all that was sent has left. post: handing a transfer over to the backend. update: the
optimizer, after the walk; without an action."""

Record = Callable[[Lane, Action | None], AbstractContextManager[object]]

_NOTHING = nullcontext()


def not_recorded(lane: Lane, action: Action | None) -> AbstractContextManager[object]:
    """A record of nothing."""
    return _NOTHING
