"""What a run was trained on, as a record that goes with its checkpoints, and whether it is still the same."""

from collections.abc import Iterator, Mapping
from typing import Any

from megalite.data.blend import BlendedDataset
from megalite.data.chat_samples import ChatDatasets, ChatSamples
from megalite.data.datasets import Datasets, SampleDataset
from megalite.data.error import DataError

_INFORMATION = {"prefix", "passes", "epochs"}  # data may move, and a longer run pass through it more often


def describe_data(datasets: Datasets | ChatDatasets) -> dict[str, Any]:
    """The files of a run and all that decides which samples they give, in which order; JSON-able.

    Beside the parts, `former`: what the run has trained on before its present blend, and does no more.
    """
    parts = datasets._asdict().items()
    described = {part: _describe(dataset) for part, dataset in parts if dataset is not None}
    if isinstance(datasets.train, BlendedDataset) and datasets.train.before.former:
        described["former"] = [dict(row) for row in datasets.train.before.former]
    return described


def _describe(dataset: SampleDataset | ChatSamples) -> list[dict[str, Any]]:
    if isinstance(dataset, ChatSamples):
        return dataset.description
    if isinstance(dataset, BlendedDataset):
        shares = zip(dataset.datasets, dataset.weights, dataset.before.read, strict=True)
        return [
            {**_describe(one)[0], "weight": weight, **({"read": read} if read else {})}
            for one, weight, read in shares
        ]
    passes = {"passes": dataset.num_epochs} if dataset.single_epochs else {}
    content = {**dataset.fingerprint, "ids_sha256": dataset.indexed.ids_sha256}
    return [{"prefix": dataset.indexed.prefix, "weight": None, **content, **passes}]


def check_same_data(recorded: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Raise DataError, naming the first difference, when two descriptions would give other samples.

    where: what the first belongs to, for the message. A part that one of them does not have is not compared.
    """
    for difference in differences(recorded, found):
        remedy = (
            "give the run its former data, begin another one with checkpoint.start_from, or set "
            "data.allow_other_data=true"
        )
        raise DataError(f"this is not the data of {where}: {difference}: {remedy}")


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """In which two descriptions would give other samples; a part that only one of them has is left out."""
    for part in [part for part in recorded if part in found]:
        before, now = recorded[part], found[part]
        if len(before) != len(now):
            yield f"{part}: expected {len(before)} datasets, found {len(now)}"
            return
        for number, (old, new) in enumerate(zip(before, now, strict=True), 1):
            fields = [field for field in new if field in old and field not in _INFORMATION]
            for field in [field for field in fields if old[field] != new[field]]:
                place = f"{part} dataset {number} of {len(now)} ({new['prefix']})"
                yield f"{place}: {field}: expected {old[field]}, found {new[field]}"
