"""The rules of the schedules: what one rank computes, in order; transfers follow from it (transfers.py).

p ranks, m micro batches, v chunks a rank. Every rule runs the forwards of a chunk, its backwards and its
weight gradients in the order of the micro batches, so that gradients are summed in the same order whatever
the schedule.

Sources: GPipe (Huang 2019, arXiv 1811.06965); 1F1B as PipeDream-flush, and interleaved (Narayanan 2021, arXiv
2104.04473, section 2.2); ZB-H1 (Qi 2023, arXiv 2401.10241); ZBV (Qi 2024, arXiv 2405.15362).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count, pairwise
from math import ceil
from typing import Any

from megalite.pipeline.actions import Backward, BackwardInput, BackwardWeight, Compute, Forward

Order = list[Compute]


def all_forward_all_backward(rank: int, p: int, m: int, v: int = 1) -> Order:
    """All forwards, then all backwards (GPipe). Keeps the activations of every micro batch at once."""
    return [*map(Forward, range(m)), *map(Backward, range(m))]


def one_forward_one_backward(rank: int, p: int, m: int, v: int = 1) -> Order:
    """Warm-up forwards, then one forward and one backward in turn, then the backwards that remain (1F1B).

    Keeps the activations of at most `p - rank` micro batches at once, however many there are.
    """
    return _in_turn([Forward(i) for i in range(m)], [Backward(i) for i in range(m)], p - rank - 1)


def interleaved(rank: int, p: int, m: int, v: int) -> Order:
    """1F1B over chunks: a group of at least p micro batches passes one chunk, then the next.

    Waits 1 / v of 1F1B's time; keeps more activations, and transfers v times as much. Groups are as equal as
    m allows, the first one largest: after a smaller one ranks would wait for each other.
    """
    num_groups = max(1, m // p)
    borders = [ceil(m * g / num_groups) for g in range(num_groups + 1)]
    turns = [range(first, end) for first, end in pairwise(borders)]
    forwards = [Forward(i, k) for turn in turns for k in range(v) for i in turn]
    backwards = [Backward(i, k) for turn in turns for k in reversed(range(v)) for i in turn]
    return _in_turn(forwards, backwards, 2 * (p - rank - 1) + (v - 1) * len(turns[0]))


def zero_bubble_h1(rank: int, p: int, m: int, v: int = 1) -> Order:
    """1F1B whose weight gradients wait until there is nothing else to do (ZB-H1).

    Every rank keeps as many activations as the first one of 1F1B.
    """
    num_ahead = min(p - 1 - rank, m)
    order: Order = [Forward(i) for i in range(num_ahead)]
    for i in range(m):
        order += [Forward(num_ahead + i)] if num_ahead + i < m else []
        order.append(BackwardInput(i))
        order += [BackwardWeight(i - rank)] if i >= rank else []
    return order + [BackwardWeight(i) for i in range(max(0, m - rank), m)]


def zero_bubble_v(rank: int, p: int, m: int, v: int = 2) -> Order:
    """ZBV: two chunks that lie as a V. Activations as 1F1B's first rank keeps, and the least waiting.

    With fewer micro batches than fill the V, 2p - 1, it is the same list without those that are not there.
    """
    filled = max(m, 2 * p - 1)
    number: dict[Any, tuple] = {kind: (count(), count()) for kind in (Forward, BackwardInput, BackwardWeight)}
    order: Order = []

    def add(*kinds_and_chunks: tuple[Any, int]) -> None:
        for kind, chunk in kinds_and_chunks:
            i = next(number[kind][chunk])
            order.extend([kind(i, chunk)] if i < m else [])

    forward, whole = [(Forward, 0), (Forward, 1)], [(BackwardInput, 1), (BackwardWeight, 1)]
    returning = [(BackwardInput, 0), (BackwardWeight, 0)]
    num_ahead = 2 * (p - rank) - 1
    add(*[forward[0]] * num_ahead, *[forward[1], forward[0]] * rank, *[forward[1], *whole] * (p - rank))
    add(*[forward[0], *returning, forward[1], *whole] * (filled - num_ahead - rank))
    add(*[*returning, forward[1], *whole] * (num_ahead - (p - rank)))
    add(*[returning[0], whole[0]] * rank, *returning * (p - rank))
    add(*[whole[1]] * rank, *[returning[1]] * rank)
    return order


def _in_turn(forwards: list[Forward], backwards: list[Backward], num_ahead: int) -> Order:
    """Some forwards ahead, then a forward and a backward in turn, then the backwards that remain."""
    ahead, following = forwards[:num_ahead], forwards[num_ahead:]
    pairs = [action for pair in zip(following, backwards, strict=False) for action in pair]
    return [*ahead, *pairs, *backwards[len(following) :]]


@dataclass(frozen=True)
class Rule:
    """A schedule by its rule.

    Attributes:
        order: of (rank, number of ranks, micro batches, chunks).
        num_chunks: that a rank has; None: any number from 2 on.
        is_v: whether chunks lie as a V, see Placement.
        splits_backward: whether gradients of inputs and of weights are computed apart.
    """

    order: Callable[[int, int, int, int], Order]
    num_chunks: int | None = 1
    is_v: bool = False
    splits_backward: bool = False


RULES = {
    "afab": Rule(all_forward_all_backward),
    "1f1b": Rule(one_forward_one_backward),
    "interleaved": Rule(interleaved, num_chunks=None),
    "zb-h1": Rule(zero_bubble_h1, splits_backward=True),
    "zbv": Rule(zero_bubble_v, num_chunks=2, is_v=True, splits_backward=True),
}
