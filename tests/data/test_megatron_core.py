"""megatron-core as referee: it reads our files, we read its files, and samples come in the same order."""

import numpy as np
import pytest
import torch

from megalite.data.datasets import build_datasets
from megalite.data.indexed_dataset import IndexedDataset, bin_path, idx_path
from megalite.data.indexed_writer import IndexedDatasetWriter

pytest.importorskip(
    "megatron.core", reason="megatron-core is not installed (pip install --no-deps megatron-core)"
)
pytestmark = pytest.mark.filterwarnings("ignore")


class Vocabulary:
    """What megatron-core asks of a tokenizer."""

    vocab_size, eod, pad = 1000, 0, -1
    unique_identifiers = {"class": "Vocabulary"}  # noqa: RUF012


def megatron_datasets(seq_length, seed, sizes, **where):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    flags = dict.fromkeys(("reset_position_ids", "reset_attention_mask", "eod_mask_loss"), False)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        tokenizer=Vocabulary(),
        create_attention_mask=False,
        **flags,
        **where,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


def samples(dataset, count):
    return [dataset[i].tolist() for i in range(count)]


def megatron_samples(dataset, count):
    rows = [dataset[i] for i in range(count)]
    return [[*row["tokens"].tolist(), int(row["labels"][-1])] for row in rows]


def random_dataset(folder, random, name):
    with IndexedDatasetWriter(folder / name) as writer:
        for _ in range(random.integers(8, 30)):
            pieces = [random.integers(0, 1000, random.integers(0, 9)) for _ in range(random.integers(0, 3))]
            writer.add_document(pieces)
        writer.add_document([random.integers(0, 1000, 40)])
    return str(folder / name)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    assert samples(ours, len(ours)) == megatron_samples(theirs, len(theirs))


@pytest.mark.parametrize("case", range(12))
def test_one_prefix_gives_the_same_samples(tmp_path, case):
    random = np.random.default_rng(case)
    prefix = random_dataset(tmp_path, random, "a")
    seq_length, seed, counts = (
        int(random.integers(1, 9)),
        int(random.integers(0, 2**31)),
        [int(random.integers(1, 150)), 9, 0],
    )
    theirs = megatron_datasets(seq_length, seed, counts, blend=([prefix], None), split="70,30,0")
    arguments = {
        "split": "70,30,0",
        "seq_length": seq_length,
        "train_samples": counts[0],
        "validation_samples": 9,
    }
    ours = build_datasets([prefix], seed=seed, **arguments)
    assert_same(ours[0], theirs[0])
    assert_same(ours[1], theirs[1])
    other, _ = build_datasets([prefix], seed=seed + 1, **arguments)
    assert samples(other, len(other)) != megatron_samples(theirs[0], len(theirs[0])) or len(other) < 4


@pytest.mark.parametrize("weights", [None, [3.0, 1.0, 0.5], [0.2, 0.7, 0.1]])
@pytest.mark.parametrize("apart", [False, True])
def test_blends_give_the_same_samples(tmp_path, weights, apart):
    random = np.random.default_rng(7)
    prefixes = [random_dataset(tmp_path, random, name) for name in "abc"]
    blend = (prefixes, weights)
    where = {"blend_per_split": [blend, blend, None]} if apart else {"blend": blend, "split": "8,2,0"}
    theirs = megatron_datasets(4, 11, [60, 8, 0], **where)
    items = (
        prefixes
        if weights is None
        else [str(x) for pair in zip(weights, prefixes, strict=True) for x in pair]
    )
    counts = {"train_samples": 60, "validation_samples": 8}
    ours = build_datasets(items, items if apart else None, split="8,2,0", seq_length=4, seed=11, **counts)
    for part in (0, 1):
        assert_same(ours[part], theirs[part])


def test_a_blend_by_size_of_everything_is_megatrons_exhaustive_one(tmp_path):
    random = np.random.default_rng(3)
    prefixes = [random_dataset(tmp_path, random, name) for name in "abcd"]
    theirs = megatron_datasets(4, 11, [None, None, None], blend=(prefixes, None), split="1,0,0")
    counts = {"train_samples": None, "validation_samples": 0}
    assert_same(build_datasets(prefixes, split="1", seq_length=4, seed=11, **counts)[0], theirs[0])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_both_write_the_same_bytes_and_read_each_other(tmp_path, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    documents = [[[1, 2, 3], [4]], [], [[5, 6]]]
    builder = IndexedDatasetBuilder(str(bin_path(tmp_path / "theirs")), dtype=dtype)
    with IndexedDatasetWriter(tmp_path / "ours", dtype) as writer:
        for document in documents:
            writer.add_document(document)
            for sequence in document:
                builder.add_item(torch.tensor(sequence))
            builder.end_document()
    builder.finalize(str(idx_path(tmp_path / "theirs")))
    for path in (bin_path, idx_path):
        assert path(tmp_path / "ours").read_bytes() == path(tmp_path / "theirs").read_bytes()
    read_by_them = MegatronDataset(str(tmp_path / "ours"))
    read_by_us = IndexedDataset(tmp_path / "theirs")
    assert [read_by_us[i].tolist() for i in range(3)] == [read_by_them[i].tolist() for i in range(3)]
