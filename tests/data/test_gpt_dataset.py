import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.error import DataError
from megalite.data.gpt_dataset import GPTDataset, build_sample_index, plan_epochs, split_sequences


def test_golden_one_shuffle_over_three_epochs(golden):
    dataset = GPTDataset(golden, seq_length=4, num_samples=5, seed=1234)
    assert dataset.index.documents.tolist() == [2, 2, 1, 0, 1, 1, 2, 0, 0] and dataset.num_epochs == 3
    assert dataset.index.samples.tolist() == [[0, 0], [2, 0], [3, 1], [4, 1], [5, 2], [7, 1], [8, 1]]
    assert dataset.index.shuffle.tolist() == [0, 4, 3, 2, 5, 1]
    dtypes = [array.dtype for array in dataset.index]
    assert dtypes == [np.int32, np.int32, np.uint32]


def test_golden_last_epoch_kept_apart(golden):
    dataset = GPTDataset(golden, seq_length=2, num_samples=9, seed=1234)
    assert dataset.index.documents.tolist() == [2, 1, 2, 0, 1, 0, 0, 2, 1]
    assert dataset.index.samples.tolist() == [
        [0, 0], [1, 0], [1, 2], [2, 1], [3, 1], [3, 3], [4, 1],
        [5, 0], [5, 2], [6, 0], [6, 2], [7, 0], [8, 0], [8, 2],
    ]  # fmt: skip
    assert dataset.index.shuffle.tolist() == [7, 5, 6, 0, 4, 3, 2, 1, 9, 12, 11, 8, 10]
    assert [dataset[i].tolist() for i in range(len(dataset))] == [
        [1, 2, 3], [0, 4, 5], [5, 0, 1], [6, 0, 4], [2, 3, 0], [0, 1, 2], [0, 6, 0],
        [4, 5, 0], [1, 2, 3], [4, 5, 0], [6, 0, 4], [3, 0, 1], [3, 0, 6],
    ]  # fmt: skip
    assert dataset[0].dtype == np.int64 and dataset[0].shape == (3,)


def test_another_seed_gives_another_order(golden):
    first, other = (GPTDataset(golden, 2, 9, seed) for seed in (1234, 1235))
    assert [x.tolist() for x in map(first.__getitem__, range(9))] != [
        x.tolist() for x in map(other.__getitem__, range(9))
    ]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any),
    seq_length=st.integers(1, 9),
    num_samples=st.none() | st.integers(0, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_samples_are_the_shuffled_stream_cut_at_multiples_of_seq_length(
    lengths, seq_length, num_samples, seed
):
    epochs = plan_epochs(sum(lengths), seq_length, num_samples)
    index = build_sample_index(np.array(lengths, np.int32), (0, len(lengths)), seq_length, epochs, seed)
    stream = [(d, t) for d, document in enumerate(index.documents) for t in range(lengths[document])]
    assert len(index.shuffle) == (len(stream) - 1) // seq_length >= (num_samples or 0)
    assert sorted(index.shuffle.tolist()) == list(range(len(index.shuffle)))
    starts = [tuple(row) for row in index.samples.tolist()]
    assert starts[1:] == stream[seq_length::seq_length][: len(starts) - 1] and starts[0] == (0, 0)


def test_streams_of_more_tokens_than_32_bits_can_count_are_cut_right():
    length, seq_length = 2**31 - 1, 2**24 + 1
    index = build_sample_index(np.full(6, length, np.int32), (0, 6), seq_length, (2,), seed=3)
    assert len(index.shuffle) == (12 * length - 1) // seq_length > 1000
    assert [tuple(row) for row in index.samples.tolist()] == [
        divmod(j * seq_length, length) for j in range(len(index.samples))
    ]


def test_sequences_beyond_32_bits_keep_their_numbers():
    lengths = np.broadcast_to(np.array(5, np.int32), (2**31 + 3,))  # one number in memory
    index = build_sample_index(lengths, (2**31 - 1, 2**31 + 3), 4, (1,), seed=3)
    assert index.documents.dtype == np.int64
    assert sorted(index.documents.tolist()) == list(range(2**31 - 1, 2**31 + 3))


def test_one_epoch_shows_each_token_but_the_tail_once(write_dataset):
    indexed = write_dataset([range(1, 8), [], range(8, 21)])
    dataset = GPTDataset(indexed, 3, None, seed=7)
    inputs = sorted(token for i in range(len(dataset)) for token in dataset[i][:-1].tolist())
    assert len(inputs) == len(set(inputs)) == 18


def test_document_starts_say_where_each_tokens_sequence_begins_in_the_sample(write_dataset):
    """Ids tell their place in their sequence, so the start of each is known without the index."""
    dataset = GPTDataset(write_dataset([range(3), range(5), [], [0], range(7), range(30)]), 8, 40, seed=2)
    counts = set()
    for position in range(len(dataset)):
        starts = dataset.document_starts(position)
        assert starts.tolist() == np.maximum(np.arange(8) - dataset[position][:-1], 0).tolist()
        counts.add(len(set(starts.tolist())))
    assert counts >= {1, 2, 3} and starts.dtype == np.int64


def test_bounds_keep_other_sequences_out(golden):
    dataset = GPTDataset(golden, 2, 20, seed=1, bounds=(1, 3))
    tokens = {token for i in range(len(dataset)) for token in dataset[i].tolist()}
    assert tokens == {0, 4, 5, 6}


def test_positions_outside_are_index_errors(golden):
    dataset = GPTDataset(golden, 2, 9, 1234)
    for position in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[position]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bounds": (1, 1)}, r"data: validation split is empty: 0 of 3 sequences"),
        ({"bounds": (0, 4)}, r"bounds: expected within 0 to 3"),
        ({"seq_length": 9}, r"too small: one sample needs 10 tokens, found 9"),
        ({"seq_length": 0}, r"expected at least 1 token"),
        ({"num_samples": -1}, r"expected at least 1 token and 0 samples"),
    ],
)
def test_what_cannot_be_sampled_is_refused(golden, arguments, message):
    settings = {"seq_length": 2, "num_samples": None, "seed": 1, "split": "validation", **arguments}
    with pytest.raises(DataError, match=message):
        GPTDataset(golden, **settings)


def test_sequences_without_tokens_are_an_empty_split(write_dataset):
    with pytest.raises(DataError, match="empty"):
        GPTDataset(write_dataset([[], []]), 2, 4, 1)


@pytest.mark.parametrize(
    "split, count, expected",
    [
        ("969,30,1", 1000, [(0, 969), (969, 999), (999, 1000)]),
        ("1,1", 5, [(0, 2), (2, 5), None]),  # 2.5 rounds to the even 2
        ("1,0,0", 3, [(0, 3), None, None]),
        ("99, .5, .5", 100, [(0, 99), (99, 100), (100, 100)]),  # 99.5 rounds to the even 100
        ("0,1,1", 4, [None, (0, 2), (2, 4)]),
    ],
)
def test_splits_round_like_megatron(split, count, expected):
    assert split_sequences(split, count) == expected


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0", "1;2", "1..2"])
def test_a_split_that_means_nothing_is_refused(split):
    with pytest.raises(DataError, match=r"data\.split"):
        split_sequences(split, 10)
