"""Which conversations share a sample, and in which order the samples come; pure arithmetic.

Each epoch is shuffled by seed and epoch alone, then packed best fit decreasing: longest first, each into the
fullest bin that has room. No conversation is cut, and none is left out. All draws come from
`numpy.random.RandomState`, a stream that NumPy keeps frozen.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megalite.data.blend import blend_by_weight, positions_within
from megalite.data.error import DataError


class Bins(NamedTuple):
    """Samples in order: bin i holds items `members[starts[i] : starts[i + 1]]`; both i64."""

    starts: np.ndarray
    members: np.ndarray

    @property
    def num_bins(self) -> int:
        """How many there are."""
        return len(self.starts) - 1

    def bin(self, index: int) -> np.ndarray:
        """The items of one bin."""
        return self.members[self.starts[index] : self.starts[index + 1]]

    @classmethod
    def of(cls, bins: Sequence[Sequence[int] | np.ndarray]) -> "Bins":
        """Of lists of items."""
        sizes = np.array([0, *map(len, bins)], np.int64)
        members = np.concatenate([np.empty(0, np.int64), *(np.asarray(one, np.int64) for one in bins)])
        return cls(np.cumsum(sizes), members)


class SampleOrder(NamedTuple):
    """How samples are drawn from sources.

    seq_length: tokens that fit a sample. packing: whether items share samples. shuffle: whether each epoch
    has an order of its own, by the seed, or all have that of the sources.
    """

    seq_length: int
    seed: int
    packing: bool
    shuffle: bool


def draw(
    lengths: Sequence[np.ndarray], weights: Sequence[float] | None, order: SampleOrder, count: int | None
) -> Bins:
    """`count` samples of sources whose items have these lengths; items count on from source to source.

    Without weights all sources are one. With weights each gives its share of the samples: next comes the one
    furthest behind. Longer draws begin with shorter ones. None stands for one epoch.
    """
    if weights is None:
        return _take(np.concatenate(lengths), order, count)
    if count is None:
        raise DataError(f"data: weights {list(weights)} need a number of samples: leave the weights out")
    chosen = blend_by_weight(weights, count)
    shares = np.bincount(chosen, minlength=len(lengths)).tolist()
    offsets = np.cumsum([0, *map(len, lengths)]).tolist()
    drawn = [_take(part, order, share) for part, share in zip(lengths, shares, strict=True)]
    within = positions_within(chosen, len(lengths))
    pairs = zip(chosen.tolist(), within.tolist(), strict=True)
    return Bins.of([drawn[source].bin(index) + offsets[source] for source, index in pairs])


def _take(lengths: np.ndarray, order: SampleOrder, count: int | None) -> Bins:
    """The first `count` samples of as many epochs as that takes."""
    bins = epoch(lengths, order, 0)
    number = 1
    while count is not None and len(bins) < count:
        bins += epoch(lengths, order, number)
        number += 1
    return Bins.of(bins[:count])


def epoch(lengths: np.ndarray, order: SampleOrder, number: int) -> list[list[int]]:
    """The samples of one epoch, each a list of items: every item is in exactly one."""
    random = np.random.RandomState([order.seed, number])
    items = random.permutation(len(lengths)) if order.shuffle else np.arange(len(lengths))
    if not order.packing:
        return items.reshape(-1, 1).tolist()
    bins = sorted(sorted(one) for one in pack(lengths[items], order.seq_length))  # by the first item of each
    ranks = random.permutation(len(bins)) if order.shuffle else range(len(bins))
    return [[int(items[place]) for place in bins[rank]] for rank in ranks]


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Items to bins, best fit decreasing; lengths must be 1 to `capacity`.

    Bit r of `open_rooms` says whether some bin has exactly r left, so that the best fit is found at once.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_rooms = 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = open_rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            target = with_room[room].pop()
            if not with_room[room]:
                open_rooms &= ~(1 << room)
        else:
            room, target = capacity, len(bins)
            bins.append([])
        bins[target].append(item)
        with_room[room - length].append(target)
        open_rooms |= 1 << (room - length)
    return bins
