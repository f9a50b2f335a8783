"""Pipeline schedules as plain lists of actions: what one stage computes and exchanges, in order.

Nothing here communicates; a runner walks the list. Micro batches are numbered from 0, and every schedule runs
forwards, and backwards, in that order, so that gradients are summed in the same order whatever the schedule.

Sources: GPipe (Huang 2019, arXiv 1811.06965) for all-forward-all-backward; PipeDream-flush (Narayanan 2021,
arXiv 2104.04473, section 2.2) as scheduled by Megatron-LM for one-forward-one-backward.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Forward:
    """Run this stage's layers on one micro batch."""

    micro_batch: int


@dataclass(frozen=True)
class Backward:
    """Back-propagate one micro batch through this stage's layers."""

    micro_batch: int


@dataclass(frozen=True)
class Exchange:
    """One group of point-to-point operations, posted together and waited for together.

    Each field is the number of the micro batch that travels, or None. `send_forward` and `recv_backward`
    talk to the next stage, `recv_forward` and `send_backward` to the previous one. Every exchange of the
    schedules below talks to one neighbour only, and that neighbour's list holds the mirrored exchange at the
    matching place: they meet as NCCL asks, one group against one group, and nothing needs to be buffered.
    """

    send_forward: int | None = None
    recv_forward: int | None = None
    send_backward: int | None = None
    recv_backward: int | None = None


Action = Forward | Backward | Exchange


def all_forward_all_backward(stage: int, num_stages: int, num_micro_batches: int) -> list[Action]:
    """All forwards, then all backwards (GPipe). Keeps the activations of every micro batch at once."""
    actions = forward_only(stage, num_stages, num_micro_batches)
    for micro_batch in range(num_micro_batches):
        actions += _exchange(stage, num_stages, recv_backward=micro_batch)
        actions.append(Backward(micro_batch))
        actions += _exchange(stage, num_stages, send_backward=micro_batch)
    return actions


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
    return actions


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
        raise ValueError(f"pipeline_schedule {name!r} is unknown: choose one of {known}")
    if num_micro_batches < 1:
        raise ValueError(f"a step of {num_micro_batches} micro batches trains nothing: give at least 1")
    return SCHEDULES[name](stage, num_stages, num_micro_batches)


def _exchange(
    stage: int,
    num_stages: int,
    send_forward: int | None = None,
    recv_forward: int | None = None,
    send_backward: int | None = None,
    recv_backward: int | None = None,
) -> list[Exchange]:
    """The exchange without operations towards a neighbour that does not exist; nothing if none remain."""
    if stage == 0:
        recv_forward = send_backward = None
    if stage == num_stages - 1:
        send_forward = recv_backward = None
    exchange = Exchange(send_forward, recv_forward, send_backward, recv_backward)
    return [] if exchange == Exchange() else [exchange]


def _check(stage: int, num_stages: int, num_micro_batches: int) -> None:
    if not 0 <= stage < num_stages:
        raise ValueError(f"stage {stage} does not exist in a pipeline of {num_stages}: stages count from 0")
    if num_micro_batches < 0:
        raise ValueError(f"the number of micro batches is {num_micro_batches}: it cannot be negative")
