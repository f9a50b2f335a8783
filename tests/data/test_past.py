"""A run whose blend changes reads each file on from its next sample, against loops over Megatron's order."""

import json
import math
import random
import re

import numpy as np
import pytest

from megalite.data.blend import Before, BlendedDataset
from megalite.data.datasets import build_datasets
from megalite.data.error import DataError
from megalite.data.fingerprint import describe_data
from megalite.data.indexed_dataset import bin_path, idx_path
from megalite.data.loader import BatchLoader
from megalite.data.past import Past

SEQ_LENGTH, SEED, NAMES = 4, 5, "abcd"
LENGTHS = {"a": 9, "b": 14, "c": 5, "d": 23}  # sequences of each file


@pytest.fixture
def files(write_dataset):
    """Four files of which no two tokens are alike, so that a sample tells where it comes from."""
    draw, files, token = random.Random(3), {}, 0
    for name in NAMES:
        sizes = [draw.randint(1, 7) for _ in range(LENGTHS[name] - 1)] + [SEQ_LENGTH + 2]
        documents = [
            list(range(token + sum(sizes[:i]), token + sum(sizes[: i + 1]))) for i in range(len(sizes))
        ]
        token += sum(sizes)
        files[name] = write_dataset(documents, name).prefix, documents
    return files


# The reference: lists and loops, after megatron-core 0.16


def samples_of(documents, epochs, draws):
    """All samples over groups of epochs, in the order in which they are read."""
    order = []
    for group in epochs:
        numbers = np.tile(np.arange(len(documents), dtype=np.int32), group)
        draws.shuffle(numbers)
        order += numbers.tolist()
    stream = [token for number in order for token in documents[number]]
    total = (len(stream) - 1) // SEQ_LENGTH
    per_epoch = len(stream) // sum(epochs)
    cut = (epochs[0] * per_epoch - 1) // SEQ_LENGTH if len(epochs) > 1 else total
    positions = []
    for first, end in ((0, cut), (cut, total)):
        part = np.arange(first, end, dtype=np.uint32)
        if len(part):
            draws.shuffle(part)
        positions += part.tolist()
    return [stream[j * SEQ_LENGTH : (j + 1) * SEQ_LENGTH + 1] for j in positions]


def epochs_for(documents, wanted):
    tokens = sum(map(len, documents))
    epochs = 1
    while (epochs * tokens - 1) // SEQ_LENGTH < wanted:
        epochs += 1
    missing = wanted - ((epochs - 1) * tokens - 1) // SEQ_LENGTH
    apart = epochs > 1 and missing < int(0.8 * ((tokens - 1) // SEQ_LENGTH))
    return [epochs - 1, 1] if apart else [epochs]


class Reader:
    """One file, read sample by sample."""

    def __init__(self, documents, epochs):
        self.documents, self.taken, self.singles = documents, 0, 0
        self.ready = samples_of(documents, epochs, np.random.RandomState(SEED))

    @property
    def left(self):
        return len(self.ready) - self.taken

    def next(self):
        if not self.left:
            self.singles += 1
            self.ready += samples_of(self.documents, [1], np.random.RandomState([SEED, self.singles]))
        self.taken += 1
        return self.ready[self.taken - 1]


def read_blend(files, readers, items, count, until_end):
    """The next `count` samples of a blend that begins here, of which `until_end` are foreseen."""
    names, weights = (items[1::2], items[::2]) if isinstance(items[0], float) else (items, None)
    for name in names:
        if name in readers:
            continue
        documents = files[name][1]
        wanted = 0  # without weights one epoch, and a lone file what is needed
        if weights:
            wanted = math.ceil(
                math.ceil(until_end * (np.array(weights) / sum(weights))[names.index(name)]) * 1.005
            )
        elif len(names) == 1:
            wanted = until_end if not readers else math.ceil(until_end * 1.005)
        readers[name] = Reader(documents, epochs_for(documents, wanted))
    shares = np.array(weights or [readers[name].left if len(names) > 1 else 1 for name in names], np.float64)
    shares = shares / shares.sum()
    shares = (shares / shares.sum() if weights else shares).tolist()
    used, out = [0] * len(names), []
    for i in range(count):
        behind = [share * max(i, 1) - n for share, n in zip(shares, used, strict=True)]
        k = behind.index(max(behind))
        used[k] += 1
        out.append(readers[names[k]].next())
    return out


# What it is compared with


def opened(files, items, total, past=None, **changes):
    texts = [
        item if isinstance(item, str) and len(item) > 1 else str(files.get(item, [item])[0]) for item in items
    ]
    settings = {"split": "1", "seq_length": SEQ_LENGTH, "seed": SEED, "train_samples": total, **changes}
    return build_datasets(texts, **settings, past=past)


def saved(datasets, consumed, **further):
    """The state of a checkpoint, as it comes back from its file."""
    return json.loads(json.dumps({"data": describe_data(datasets), "consumed_samples": consumed, **further}))


def batches_of(dataset, first, end, size, dp_size):
    """What all ranks read, put together in order."""
    slices = {"global_batch_samples": size, "num_micro_batches": 1, "vocab_size": 10**4, "dp_size": dp_size}
    loaders = [BatchLoader(dataset, dp_rank=rank, **slices) for rank in range(dp_size)]
    rows = []
    for place in range(first, end, size):
        for loader in loaders:
            (batch,) = loader.batch(place)
            rows += np.column_stack([batch.input_ids, batch.labels[:, -1]]).tolist()
    return rows


def drawn_blend(draw):
    names = draw.sample(NAMES, draw.randint(1, 4))
    if draw.random() < 0.7:
        return [item for name in names for item in (round(draw.uniform(0.1, 1), 2), name)]
    return names


def continued(files, blends, dp_size, end_of_run):
    """What a run reads that is resumed with each of these blends, and then once more with the same."""
    rows, consumed, past = [], 0, None
    for items, steps, size in blends:
        for _ in range(2):  # the second time nothing changes but a checkpoint in between
            datasets = opened(files, items, end_of_run, past)
            rows += batches_of(datasets.train, consumed, consumed + steps * size, size, dp_size)
            consumed += steps * size
            past = Past.of(saved(datasets, consumed), "here")
    return rows


@pytest.mark.parametrize("dp_size", [1, 2])
def test_two_changes_of_the_blend_read_each_file_on_in_its_order(files, dp_size):
    compared = 0
    for seed in range(60):
        draw = random.Random(seed)
        blends = [(drawn_blend(draw), draw.randint(1, 2), draw.choice([2, 4])) for _ in range(3)]
        end_of_run = sum(2 * steps * size for _, steps, size in blends) + draw.randint(0, 40)
        readers, expected, places = {}, [], 0
        for items, steps, size in blends:
            count = 2 * steps * size
            expected += read_blend(files, readers, items, count, end_of_run - places)
            places += count
        try:
            found = continued(files, blends, dp_size, end_of_run)
        except DataError as error:
            by_size = [items for items, *_ in blends if len(items) > 1 and isinstance(items[0], str)]
            assert by_size and ("exhausted" in str(error) or "no unread sample is left" in str(error)), error
            continue
        assert found == expected, (seed, blends)
        compared += 1
    assert compared > 30


def test_files_go_on_end_and_come_back(files):
    first = opened(files, [0.5, "a", 0.5, "c"], 12)
    second = opened(files, [0.5, "a", 0.5, "b"], 90, Past.of(saved(first, 8), "here"))
    assert second.train.before == Before((4, 0), tuple(saved(second, 8)["data"]["former"]))
    assert [row["prefix"] for row in second.train.before.former] == [files["c"][0]]
    assert [dataset.single_epochs != [] for dataset in second.train.datasets] == [True, False]
    third = opened(files, ["c"], 90, Past.of(saved(second, 28), "here"))
    assert (third.train.before.read, third.train.before.samples) == ((4,), 28)
    assert {row["prefix"]: row["read"] for row in third.train.before.former} == {
        files["a"][0]: 14,
        files["b"][0]: 10,
    }


def test_a_longer_run_goes_on_in_its_order_and_one_epoch_more(files):
    short, whole = opened(files, ["a"], 8), opened(files, ["a"], 30)
    assert short.train.epochs != whole.train.epochs  # from its beginning it would have had another order
    longer = opened(files, ["a"], 30, Past.of(saved(short, 6), "here")).train
    reader = Reader(files["a"][1], epochs_for(files["a"][1], 8))
    assert [longer[i].tolist() for i in range(30)] == [reader.next() for _ in range(30)]
    assert longer.single_epochs and saved(short, 6)["data"]["train"][0]["epochs"] == list(longer.epochs)


def test_files_may_move_while_the_blend_changes(files):
    past = Past.of(saved(opened(files, [0.5, "a", 0.5, "b"], 12), 8), "here")
    moved = files["a"][0] + "_moved"
    for path in (bin_path, idx_path):
        path(files["a"][0]).rename(path(moved))
    train = opened(files, [0.2, "b", 0.5, moved, 0.3, "d"], 40, past).train
    assert train.before == Before((4, 4, 0)) and train[8].tolist() == train.datasets[1][4].tolist()


def test_a_sample_of_before_the_blend_is_not_there(files):
    past = Past.of(saved(opened(files, ["a"], 12), 8), "here")
    train = opened(files, [0.5, "a", 0.5, "b"], 40, past).train
    assert isinstance(train, BlendedDataset) and len(train) >= 40
    with pytest.raises(DataError, match="sample 7 is of data that the run has left after 8 samples"):
        train[7]


def refusal(files, items, past, **changes):
    with pytest.raises(DataError) as caught:
        opened(files, items, 40, past, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def halfway(files):
    return saved(opened(files, [0.5, "a", 0.5, "b"], 12), 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "train dataset 1 of 3 .*/a.: seed: expected 5, found 6: keep seed"),
        ({"seq_length": 3}, "seq_length: expected 4, found 3: keep data.seq_length"),
        (
            {"split": "8,2,0"},
            r"sequences: expected \[0, 9\], found \[0, 7\]: data.split can change for files",
        ),
    ],
    ids=str,
)
def test_another_order_of_what_was_read_is_refused(files, halfway, changes, message):
    text = refusal(files, [0.4, "a", 0.4, "b", 0.2, "c"], Past.of(halfway, "step-2"), **changes)
    assert text.startswith("this is not the data of step-2: ") and re.search(message, text), text
    assert text.endswith(", or set data.allow_other_data=true")


def test_samples_of_another_length_are_refused_even_where_all_files_are_new(files, halfway):
    assert "seq_length: expected 4" in refusal(files, ["c", "d"], Past.of(halfway, "x"), seq_length=3)
    opened(files, ["c", "d"], 12, Past.of(halfway, "x"), seed=6, split="8,2,0")  # which were not read yet


def test_a_file_that_has_changed_is_refused(files, halfway, write_dataset):
    write_dataset([[1] * 5] * 9, "a")
    text = refusal(files, [0.4, "b", 0.6, "a"], Past.of(halfway, "x"))
    assert "/a): bin_bytes: expected" in text and "give what is new a prefix of its own" in text


def test_samples_to_be_left_out_that_lie_ahead_belong_to_their_blend(files, halfway):
    past = Past.of({**halfway, "left_out": [[4, 6], [10, 12]]}, "x")
    assert "samples 10 to 11, which the run has gone back over" in refusal(files, ["a"], past)
    assert "change it after 12 samples" in refusal(files, ["a"], past)
    opened(files, [0.5, "a", 0.5, "b"], 40, past)
    opened(files, ["a"], 40, Past.of({**halfway, "left_out": [[4, 6]]}, "x"))


def test_a_file_that_is_read_through_has_no_size_any_more(files):
    datasets = opened(files, ["a"], 8)
    past = Past.of(saved(datasets, len(datasets.train)), "x")
    assert "/a: no unread sample is left" in refusal(files, ["a", "b"], past)
    train = opened(files, [0.5, "a", 0.5, "b"], 40, past).train
    assert train.datasets[0].single_epochs


def test_what_has_no_record_of_data_has_no_past():
    assert Past.of({}, "x") is None and Past.of({"data": {}, "consumed_samples": 4}, "x") is None


def test_other_weights_of_the_same_files_are_another_blend(files, halfway):
    past = Past.of(halfway, "x")
    assert opened(files, [0.2, "a", 0.8, "b"], 40, past).train.before == Before((4, 4))
    assert opened(files, [0.5, "a", 0.5, "b"], 40, past).train.before == Before((0, 0))
