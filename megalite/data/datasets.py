"""Prefixes, weights and a split to the training and validation datasets of a run."""

from collections.abc import Sequence

from megalite.data.blend import BlendedDataset, normalize, parse_blend, target_samples
from megalite.data.error import DataError
from megalite.data.gpt_dataset import SPLITS, GPTDataset, split_sequences
from megalite.data.indexed_dataset import IndexedDataset

SampleDataset = GPTDataset | BlendedDataset


def build_datasets(
    train: Sequence[str],
    validation: Sequence[str] | None = None,
    *,
    split: str,
    seq_length: int,
    train_samples: int | None,
    validation_samples: int | None,
    seed: int,
) -> tuple[SampleDataset, SampleDataset | None]:
    """The training dataset, and the validation dataset or None when `validation_samples` is 0.

    `train` and `validation` list prefixes, or weight and prefix in turn. Without `validation`, both come from
    the sequences of `train`, cut by `split`; with it, each list is used whole and `split` has no effect. The
    order of the samples is that of Megatron-core for `blend` and `split`, or for `blend_per_split`.

    Megatron's counts: train_samples = steps * global batch; validation_samples =
    (steps // validate_every + 1) * validation_steps * global batch. None stands for one epoch of every file,
    which leaves no room for weights.

    Raises DataError for files, weights or a split that cannot serve.
    """
    build = _Builder(split if validation is None else None, seq_length, seed)
    training = build(train, 0, train_samples)
    if validation_samples == 0:
        return training, None
    return training, build(train if validation is None else validation, 1, validation_samples)


class _Builder:
    """Builds one part (0 train, 1 validation) from a list of prefixes; opens each prefix once."""

    def __init__(self, split: str | None, seq_length: int, seed: int) -> None:
        self.split, self.seq_length, self.seed = split, seq_length, seed
        self.opened: dict[str, IndexedDataset] = {}

    def __call__(self, items: Sequence[str], part: int, num_samples: int | None) -> SampleDataset:
        prefixes, weights = parse_blend(items)
        # Megatron blends a lone prefix that has a weight, which changes its order, unless given per split.
        if len(prefixes) == 1 and (weights is None or self.split is None):
            return self._single(prefixes[0], part, num_samples)
        if weights is None:
            datasets = [self._single(prefix, part, None) for prefix in prefixes]
            sizes = [len(dataset) for dataset in datasets]
            total = sum(sizes)
            return BlendedDataset(datasets, sizes, total if num_samples is None else min(num_samples, total))
        if num_samples is None:
            raise DataError(
                f"data: weights {weights} need a number of samples: name one, or leave the weights out"
            )
        shares = normalize(weights).tolist()
        targets, built = target_samples(shares, num_samples)
        datasets = [self._single(prefix, part, count) for prefix, count in zip(prefixes, built, strict=True)]
        return BlendedDataset(datasets, shares, sum(targets))

    def _single(self, prefix: str, part: int, num_samples: int | None) -> GPTDataset:
        if prefix not in self.opened:
            self.opened[prefix] = IndexedDataset(prefix)
        indexed, name = self.opened[prefix], SPLITS[part]
        bounds: tuple[int, int] | None = (0, len(indexed))
        if self.split is not None:
            bounds = split_sequences(self.split, len(indexed))[part]
        if bounds is None:
            remedy = "give it a weight, name data.validation, or switch validation off"
            raise DataError(f"{prefix}: data.split {self.split!r} leaves nothing for {name}: {remedy}")
        return GPTDataset(indexed, self.seq_length, num_samples, self.seed, bounds, name)
