"""What a run has read of each of its files until its newest checkpoint: another blend goes on from there.

A checkpoint records its blend, and of each dataset how much was read before that blend began. The order of a
blend follows from its weights alone, so what was read since can be counted without the files.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalite.data.blend import Before, blend_by_share, normalize
from megalite.data.error import DataError

Row = Mapping[str, Any]
_CONTENT = ("bin_bytes", "idx_bytes", "idx_sha256", "ids_sha256")
_REMEDIES = dict.fromkeys(_CONTENT, "the file has changed: give what is new a prefix of its own") | {
    "sequences": "data.split can change for files that were not read yet",
    "seq_length": "keep data.seq_length",
    "seed": "keep seed",
}


@dataclass(frozen=True)
class Past:
    """blend: the datasets that the run reads; former: those that it had left before; as recorded.

    consumed_samples: of all.
    ahead: samples that it was to leave out, and has not passed by yet, [first, end).
    where: the checkpoint, for messages.
    """

    blend: tuple[Row, ...]
    former: tuple[Row, ...]
    consumed_samples: int
    ahead: tuple[tuple[int, int], ...]
    where: str

    @classmethod
    def of(cls, state: Mapping[str, Any], where: str) -> "Past | None":
        """What a checkpoint's state says; None where it knows of no data."""
        data, consumed = state.get("data", {}), state.get("consumed_samples", 0)
        if "train" not in data:
            return None
        ahead = tuple((first, end) for first, end in state.get("left_out", ()) if end > consumed)
        return cls(tuple(data["train"]), tuple(data.get("former", ())), consumed, ahead, where)

    @property
    def _shares(self) -> list[float]:
        """Of the blend's datasets; a file that is no blend has all."""
        return [1.0 if row["weight"] is None else row["weight"] for row in self.blend]

    def find(self, datasets: Sequence[Row]) -> list[int | None]:
        """Per dataset, which row of blend and former it is; None where it is new.

        A file is known by its prefix, or by its content where it has moved.

        datasets: as recorded, but for weight and epochs.

        Raises DataError for a known one of which other samples would be read, or in another order.
        """
        rows, prefixes = self.blend + self.former, {dataset["prefix"] for dataset in datasets}
        free = list(range(len(rows)))
        found: list[int | None] = []
        for number, dataset in enumerate(datasets, 1):
            same_name = (at for at in free if rows[at]["prefix"] == dataset["prefix"])
            absent = (at for at in free if rows[at]["prefix"] not in prefixes)
            moved = (at for at in absent if not _differing(rows[at], dataset, _CONTENT))
            at = next(same_name, None)
            at = next(moved, None) if at is None else at
            place = f"train dataset {number} of {len(datasets)} ({dataset['prefix']})"
            self._check(place, rows[0] if at is None else rows[at], dataset, is_known=at is not None)
            if at is not None:
                free.remove(at)
            found.append(at)
        return found

    def _check(self, place: str, row: Row, dataset: Row, *, is_known: bool) -> None:
        fields = _REMEDIES if is_known else ("seq_length",)  # what is counted are samples, all of one length
        for field in _differing(row, dataset, fields):
            raise self._refusal(
                f"{place}: {field}: expected {row[field]}, found {dataset[field]}: {_REMEDIES[field]}"
            )

    def _refusal(self, reason: str) -> DataError:
        """Why the run cannot go on with what it is given."""
        return DataError(f"this is not the data of {self.where}: {reason}, or set data.allow_other_data=true")

    def epochs(self, at: int | None) -> Sequence[int] | None:
        """Those that the order of a row began with."""
        return None if at is None else (self.blend + self.former)[at]["epochs"]

    def before_blend(self, found: Sequence[int | None], weigh: Callable[[Before], list[float]]) -> Before:
        """What came before the blend of the datasets found: as recorded, or all that was read, for another.

        weigh: the weights of its datasets, which may follow from what was read of them.
        """
        if list(found) == list(range(len(self.blend))):
            before = Before(tuple(row.get("read", 0) for row in self.blend), self.former)
            weights = weigh(before)
            if all(weights) and normalize(weights).tolist() == self._shares:
                return before
        return self._ended(found)

    def _ended(self, found: Sequence[int | None]) -> Before:
        """What comes before a new blend of the datasets found, which begins where the checkpoint stands.

        Raises DataError where samples that are to be left out lie ahead: only the former blend knows them.
        """
        if self.ahead:
            first, end = self.ahead[0]
            raise self._refusal(
                f"samples {first} to {end - 1}, which the run has gone back over, lie ahead in the former "
                f"blend: change it after {self.ahead[-1][1]} samples"
            )
        read = [row.get("read", 0) for row in self.blend + self.former]
        since = blend_by_share(np.array(self._shares), self.consumed_samples - sum(read))
        for at, count in enumerate(np.bincount(since).tolist()):
            read[at] += count
        rows = zip(self.blend + self.former, read, strict=True)
        left = [
            {**row, "weight": None, "read": n} for at, (row, n) in enumerate(rows) if n and at not in found
        ]
        return Before(tuple(0 if at is None else read[at] for at in found), tuple(left))


def _differing(row: Row, dataset: Row, fields: Iterable[str]) -> list[str]:
    """In which they differ; older records do not have every field."""
    return [field for field in fields if row.get(field, dataset[field]) != dataset[field]]
