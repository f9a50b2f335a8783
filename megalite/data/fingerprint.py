"""What a run was trained on, as a record that goes with its checkpoints, and whether it is still the same."""

from collections.abc import Iterator, Mapping
from typing import Any

from megalite.data.blend import BlendedDataset
from megalite.data.chat_samples import ChatDatasets, ChatSamples
from megalite.data.datasets import Datasets, SampleDataset
from megalite.data.error import DataError

_INFORMATION = {"prefix", "passes"}  # data may move, and a longer run pass through it more often
_LENGTH_OF_VALIDATION = {"epochs"}  # grows with the run


def describe_data(datasets: Datasets | ChatDatasets) -> dict[str, Any]:
    """The files of a run and all that decides which samples they give, in which order; JSON-able."""
    parts = datasets._asdict().items()
    return {part: _describe(dataset) for part, dataset in parts if dataset is not None}


def _describe(dataset: SampleDataset | ChatSamples) -> list[dict[str, Any]]:
    if isinstance(dataset, ChatSamples):
        return dataset.description
    if isinstance(dataset, BlendedDataset):
        shares = zip(dataset.datasets, dataset.weights, strict=True)
        return [{**_describe(one)[0], "weight": weight} for one, weight in shares]
    return [{"prefix": dataset.indexed.prefix, "weight": None, **dataset.fingerprint}]


def check_same_data(recorded: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Raise DataError, naming the first difference, when two descriptions would give other samples.

    where: what the first belongs to, for the message. A part that one of them does not have is not compared.
    """
    for difference in _differences(recorded, found):
        remedy = "give the run its former data and lengths, or set data.allow_other_data=true"
        raise DataError(f"this is not the data of {where}: {difference}: {remedy}")


def _differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    for part in [part for part in recorded if part in found]:
        before, now = recorded[part], found[part]
        if len(before) != len(now):
            yield f"{part}: expected {len(before)} datasets, found {len(now)}"
            return
        ignored = _INFORMATION | (set() if part == "train" else _LENGTH_OF_VALIDATION)
        for number, (old, new) in enumerate(zip(before, now, strict=True), 1):
            for field in [field for field in new if field not in ignored and old.get(field) != new[field]]:
                place = f"{part} dataset {number} of {len(now)} ({new['prefix']})"
                yield f"{place}: {field}: expected {old.get(field)}, found {new[field]}"
