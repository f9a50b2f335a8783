"""megatron-core as referee: it reads our files, we read its files, and samples come in the same order."""

import numpy as np
import pytest
import torch

from megalite.data.blend import BlendedDataset, parse_blend
from megalite.data.cache import IndexCache
from megalite.data.datasets import build_datasets
from megalite.data.error import DataError
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

    class Peer(GPTDataset):
        def _get_num_epochs(self, num_tokens_per_epoch):
            assert num_tokens_per_epoch > 0, "it would count epochs without tokens forever"
            return super()._get_num_epochs(num_tokens_per_epoch)

    flags = dict.fromkeys(("reset_position_ids", "reset_attention_mask", "eod_mask_loss"), False)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        tokenizer=Vocabulary(),
        create_attention_mask=False,
        **flags,
        **where,
    )
    return BlendedMegatronDatasetBuilder(Peer, sizes, lambda: True, config).build()


def megatron_sample(dataset, position):
    row = dataset[position]
    return [*row["tokens"].tolist(), int(row["labels"][-1])]


NUM_CASES, BLOCKS = 520, 8
SPLITS = ["969,30,1", "70,30", "1,1,1", ".5,.3,.2", "99.5, .25, 4", "8,1,1", "1", "3,0,2", "0.1,33,67"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Datasets of many shapes; some names begin with, or lie below, others."""
    folder = tmp_path_factory.mktemp("pool")
    names = ["a", "a_b", "a_b_text_document", "sub/a", "sub/sub/a", "1", "sub/0.5", "long", "short", "pieces"]
    return [
        write_random(folder / name, seed, longest=(9, 60, 300)[seed % 3]) for seed, name in enumerate(names)
    ]


def write_random(prefix, seed, longest):
    """Some documents have several sequences, some have none."""
    random = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, (np.uint16, np.int32)[seed % 2]) as writer:
        for _ in range(int(random.integers(12, 60))):
            pieces = [
                random.integers(0, 1000, random.integers(0, longest)) for _ in range(random.integers(0, 3))
            ]
            writer.add_document(pieces)
        writer.add_document([random.integers(0, 1000, 40)])
    add_empty_sequences(prefix, random)
    return str(prefix)


def add_empty_sequences(prefix, random):
    """Put sequences without tokens into the index: never written here, but other writers leave them."""
    dataset = IndexedDataset(prefix)
    lengths = dataset.sequence_lengths.copy()
    places = np.sort(random.integers(0, len(lengths) + 1, 3))
    lengths = np.insert(lengths, places, 0)
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * dataset.dtype.itemsize
    boundaries = np.arange(len(lengths) + 1, dtype=np.int64)
    header = idx_path(prefix).read_bytes()[:18]
    counts = np.array([len(lengths), len(boundaries)], np.uint64)
    rows = [counts, lengths.astype(np.int32), pointers, boundaries]
    idx_path(prefix).write_bytes(header + b"".join(row.tobytes() for row in rows))


def random_items(random, pool):
    """A list as it stands in a configuration: prefixes, or weight and prefix in turn."""
    prefixes = [pool[i] for i in random.integers(0, len(pool), random.choice([1, 1, 2, 3, 5]))]
    if random.random() < 0.35:
        return prefixes
    as_integers = random.random() < 0.3
    weights = random.integers(1, 50, len(prefixes)) if as_integers else random.uniform(0.01, 2, len(prefixes))
    return [str(item) for pair in zip(weights.tolist(), prefixes, strict=True) for item in pair]


def random_case(random, pool):
    """What both builders are asked for: the lists, the counts and the rest."""
    apart = random.random() < 0.35
    lists = (
        [random_items(random, pool) for _ in range(3)] if apart else [random_items(random, pool), None, None]
    )
    counts = [int(n) for n in (10 ** random.uniform(0, [3, 2, 1.5])).astype(int)]
    split = str(random.choice(SPLITS))
    shares = [float(weight) for weight in split.split(",")]
    if not apart:  # no samples are asked of a part that the split leaves out
        counts = [n if part < len(shares) and shares[part] > 0 else 0 for part, n in enumerate(counts)]
    if random.random() < 0.5 and all(parse_blend(items)[1] is None for items in lists if items):
        counts = [n and None for n in counts]
    wanted = dict(zip(("train_samples", "validation_samples", "test_samples"), counts, strict=True))
    wanted["seq_length"] = int(random.choice([1, 2, 7, 16, 33, 128]))
    return lists, {"split": split, "seed": int(random.integers(0, 2**32)), **wanted}


def megatrons(lists, arguments):
    """The same from megatron-core."""
    from megatron.core.datasets.utils import get_blend_from_list

    blends = [get_blend_from_list(items) for items in lists]
    counts = [arguments[f"{part}_samples"] for part in ("train", "validation", "test")]
    apart = any(lists[1:])
    where = {"blend_per_split": blends} if apart else {"blend": blends[0], "split": arguments["split"]}
    return megatron_datasets(arguments["seq_length"], arguments["seed"], counts, **where)


def same_arrays(ours, theirs):
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def same_index(ours, theirs):
    """Whether both datasets, and those below them, have equal index arrays of equal dtype."""
    if isinstance(ours, BlendedDataset):
        pairs = zip(ours.datasets, theirs.datasets, strict=True)
        top = same_arrays(
            [ours.dataset_index, ours.sample_index], [theirs.dataset_index, theirs.dataset_sample_index]
        )
        return top and all(same_index(one, other) for one, other in pairs)
    return same_arrays(ours.index, [theirs.document_index, theirs.sample_index, theirs.shuffle_index])


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_cases_give_the_same_index_and_samples(pool, tmp_path, block):
    compared = controls = 0
    number = block
    while compared < NUM_CASES // BLOCKS:
        random = np.random.default_rng(number)
        lists, arguments = random_case(random, pool)
        cache = IndexCache(tmp_path) if random.random() < 0.1 else None
        number += BLOCKS
        try:
            ours = build_datasets(*lists, **arguments, cache=cache)
        except DataError as error:
            assert "empty" in str(error) or "too small" in str(error)
            continue
        theirs = megatrons(lists, arguments)
        compared += 1
        for one, other in zip(ours, theirs, strict=True):
            if one is not None:
                assert same_index(one, other), (lists, arguments)
                places = random.integers(0, len(one), min(20, len(one)))
                assert [one[i].tolist() for i in places] == [megatron_sample(other, i) for i in places]
        changed = build_datasets(*lists, **{**arguments, "seed": arguments["seed"] ^ 1})
        controls += not same_index(changed.train, theirs[0])
    assert controls > 0.8 * compared


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
