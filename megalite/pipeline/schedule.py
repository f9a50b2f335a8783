"""Pipeline schedules as plain lists of actions: what one stage computes and exchanges, in order.

Nothing here communicates; a runner walks the list. Micro batches are numbered from 0, and every schedule runs
forwards, and backwards, in that order, so that gradients are summed in the same order whatever the schedule.

Sources: GPipe (Huang 2019, arXiv 1811.06965) for all-forward-all-backward; PipeDream-flush (Narayanan 2021,
arXiv 2104.04473, section 2.2) as scheduled by Megatron-LM for one-forward-one-backward.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from megalite.error import UserError

Verb = Literal["send", "receive"]
Kind = Literal["activation", "gradient"]


@dataclass(frozen=True)
class Forward:
    """Run the layers of one of this stage's chunks on one micro batch."""

    micro_batch: int
    chunk: int = 0


@dataclass(frozen=True)
class Backward:
    """Back-propagate one micro batch through a chunk; is_last: no backward of the step follows it here."""

    micro_batch: int
    chunk: int = 0
    is_last: bool = False


@dataclass(frozen=True)
class Transfer:
    """One tensor that goes to, or comes from, another stage.

    Attributes:
        verb: "send" or "receive".
        kind: what travels: the "activation" that a forward made, or the "gradient" that a backward made.
        micro_batch: whose it is.
        peer: the other stage, by its pp_rank.
        chunk: which of this stage's chunks made it, or is to use it.
    """

    verb: Verb
    kind: Kind
    micro_batch: int
    peer: int
    chunk: int = 0


@dataclass(frozen=True)
class Exchange:
    """Transfers that are posted together, and waited for together.

    Every exchange of the schedules below talks to one neighbour only, and that neighbour's list holds the
    mirrored exchange at the matching place: they meet as NCCL asks, one group against one group, and nothing
    needs to be buffered.
    """

    transfers: tuple[Transfer, ...]


Action = Forward | Backward | Exchange


class ScheduleError(UserError):
    """A schedule that does not exist, or of nothing."""


def all_forward_all_backward(stage: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """All forwards, then all backwards (GPipe). Keeps the activations of every micro batch at once."""
    actions = forward_only(stage, num_stages, num_micro_batches)
    for micro_batch in range(num_micro_batches):
        actions += _exchange(stage, num_stages, recv_backward=micro_batch)
        actions.append(Backward(micro_batch))
        actions += _exchange(stage, num_stages, send_backward=micro_batch)
    return with_last_backward(actions)


def one_forward_one_backward(stage: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """Warm-up forwards, then one forward and one backward in turn, then the backwards that remain (1F1B).

    Keeps the activations of at most `num_stages - stage` micro batches at once, however many there are.
    """
    _check(stage, num_stages, num_micro_batches)
    num_warmup = min(num_stages - stage - 1, num_micro_batches)
    num_steady = num_micro_batches - num_warmup

    actions = forward_only(stage, num_stages, num_warmup)
    if num_steady:
        actions += _exchange(stage, num_stages, recv_forward=num_warmup)
    for backward in range(num_steady):
        forward = num_warmup + backward
        following = forward + 1 if forward + 1 < num_micro_batches else None
        actions.append(Forward(forward))
        actions += _exchange(stage, num_stages, send_forward=forward, recv_backward=backward)
        actions.append(Backward(backward))
        actions += _exchange(stage, num_stages, send_backward=backward, recv_forward=following)
    for backward in range(num_steady, num_micro_batches):
        actions += _exchange(stage, num_stages, recv_backward=backward)
        actions.append(Backward(backward))
        actions += _exchange(stage, num_stages, send_backward=backward)
    return with_last_backward(actions)


def forward_only(stage: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """Forwards alone, for evaluation."""
    _check(stage, num_stages, num_micro_batches)
    actions: list[Action] = []
    for micro_batch in range(num_micro_batches):
        actions += _exchange(stage, num_stages, recv_forward=micro_batch)
        actions.append(Forward(micro_batch))
        actions += _exchange(stage, num_stages, send_forward=micro_batch)
    return actions


SCHEDULES: dict[str, Callable[[int, int, int], list[Action]]] = {
    "afab": all_forward_all_backward,
    "1f1b": one_forward_one_backward,
}


def build_schedule(name: str, stage: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """The training actions of one stage, by the name of the schedule: "1f1b" or "afab"."""
    if name not in SCHEDULES:
        known = ", ".join(sorted(SCHEDULES))
        raise ScheduleError(f"pipeline_schedule {name!r} is unknown: choose one of {known}")
    if num_micro_batches < 1:
        raise ScheduleError(f"a step of {num_micro_batches} micro batches trains nothing: give at least 1")
    return SCHEDULES[name](stage, num_stages, num_micro_batches)


def with_last_backward(actions: list[Action]) -> list[Action]:
    """The actions with the last backward marked: after it gradients are to be whole."""
    last = max((i for i, action in enumerate(actions) if isinstance(action, Backward)), default=None)
    return [
        replace(action, is_last=i == last) if isinstance(action, Backward) else action
        for i, action in enumerate(actions)
    ]


def _exchange(
    stage: int,
    num_stages: int,
    send_forward: int | None = None,
    recv_forward: int | None = None,
    send_backward: int | None = None,
    recv_backward: int | None = None,
) -> list[Exchange]:
    """The exchange of these micro batches with the stages beside; nothing with one that does not exist.

    `send_forward` and `recv_backward` talk to the next stage, `recv_forward` and `send_backward` to the
    previous one.
    """
    following, previous = stage + 1, stage - 1
    rows: list[tuple[Verb, Kind, int | None, int]] = [
        ("send", "activation", send_forward, following),
        ("receive", "gradient", recv_backward, following),
        ("send", "gradient", send_backward, previous),
        ("receive", "activation", recv_forward, previous),
    ]
    transfers = tuple(
        Transfer(verb, kind, micro_batch, peer)
        for verb, kind, micro_batch, peer in rows
        if micro_batch is not None and 0 <= peer < num_stages
    )
    return [Exchange(transfers)] if transfers else []


def _check(stage: int, num_stages: int, num_micro_batches: int) -> None:
    if not 0 <= stage < num_stages:
        raise ScheduleError(
            f"stage {stage} does not exist in a pipeline of {num_stages}: stages count from 0"
        )
    if num_micro_batches < 0:
        raise ScheduleError(f"the number of micro batches is {num_micro_batches}: it cannot be negative")
