import threading

import numpy as np
import pytest
import torch

from megalite.batch import Batch
from megalite.data.error import DataError
from megalite.data.loader import BatchLoader, PreparedBatches, check_vocabulary

DIVISIONS = [(dp, micro) for dp in (1, 2, 3, 4) for micro in (1, 2, 3, 6) if 12 % (dp * micro) == 0]


class Counting:
    """Sample i is [10 i, 10 i + 1, ..., 10 i + 3]: its position can be read off."""

    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __len__(self):
        return self.num_samples

    def __getitem__(self, position):
        return np.arange(10 * position, 10 * position + 4, dtype=np.int64)

    def document_starts(self, position):
        return np.array([0, 0, position], dtype=np.int64)


def loader_of(num_samples, batch, num_micro_batches, dp_rank, dp_size, vocab_size, **options):
    return BatchLoader(
        Counting(num_samples),
        global_batch_samples=batch,
        num_micro_batches=num_micro_batches,
        dp_rank=dp_rank,
        dp_size=dp_size,
        vocab_size=vocab_size,
        **options,
    )


def positions(loader, consumed):
    return [int(row[0]) // 10 for batch in loader.batch(consumed) for row in batch.input_ids]


def test_labels_are_the_inputs_one_token_on():
    [batch] = loader_of(8, 4, 1, 1, 2, 1000).batch(4)
    inputs, labels = batch.input_ids, batch.labels
    assert inputs.tolist() == [[60, 61, 62], [70, 71, 72]] and labels.tolist() == [[61, 62, 63], [71, 72, 73]]
    assert inputs.dtype == labels.dtype == torch.int64


def test_document_starts_come_with_their_samples_when_they_are_wanted():
    loader = loader_of(8, 4, 2, 0, 1, 1000, mask_documents=True)
    assert [batch.document_starts.tolist() for batch in loader.batch(4)] == [
        [[0, 0, 4], [0, 0, 5]],
        [[0, 0, 6], [0, 0, 7]],
    ]


@pytest.mark.parametrize("dp_size, num_micro_batches", DIVISIONS)
@pytest.mark.parametrize("consumed", [0, 12, 24, 5])
def test_a_rank_reads_its_slice_whatever_the_micro_batch_is(dp_size, num_micro_batches, consumed):
    seen = []
    for rank in range(dp_size):
        loader = loader_of(36, 12, num_micro_batches, rank, dp_size, 1000)
        mine = positions(loader, consumed)
        assert mine == positions(loader_of(36, 12, 1, rank, dp_size, 1000), consumed)
        assert len(loader.batch(consumed)) == num_micro_batches
        seen += mine
    assert seen == list(range(consumed, consumed + 12))


def test_a_batch_depends_on_its_position_only():
    loader = loader_of(36, 4, 1, 0, 1, 1000)
    later_first = positions(loader, 8), positions(loader, 0), positions(loader, 8)
    assert later_first == ([8, 9, 10, 11], [0, 1, 2, 3], [8, 9, 10, 11])


def test_a_stage_between_the_ends_reads_no_token():
    class Unreadable(Counting):
        def __getitem__(self, position):
            raise AssertionError("a middle stage read tokens")

    options = {"global_batch_samples": 4, "num_micro_batches": 2, "dp_rank": 0, "dp_size": 1, "vocab_size": 9}
    assert BatchLoader(Unreadable(8), **options, reads_tokens=False).batch(0) == [Batch(), Batch()]
    masked = BatchLoader(Unreadable(8), **options, reads_tokens=False, mask_documents=True).batch(4)
    assert masked[1].document_starts.tolist() == [[0, 0, 6], [0, 0, 7]] and masked[1].labels is None
    with pytest.raises(AssertionError, match="read tokens"):
        BatchLoader(Unreadable(8), **options).batch(0)


def test_batches_that_are_prepared_ahead_are_the_same():
    loader = loader_of(36, 4, 2, 0, 1, 1000)
    prepared = PreparedBatches(loader)
    for consumed in (0, 4, 8, 20, 24, 0, 32):
        for one, other in zip(prepared.batch(consumed), loader.batch(consumed), strict=True):
            assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)


def test_what_is_prepared_is_read_before_it_is_asked_for_and_its_errors_come_with_it():
    read = threading.Event()

    class Watched(Counting):
        def __getitem__(self, position):
            if position == 4:
                read.set()
            return super().__getitem__(position)

    loader = loader_of(8, 4, 1, 0, 1, 1000)
    loader.dataset = Watched(6)
    prepared = PreparedBatches(loader)
    prepared.batch(0)  # the one after it does not exist, and nobody has asked for it
    loader.dataset = Watched(8)
    prepared.batch(0)
    assert read.wait(10)
    prepared.batch(4)
    with pytest.raises(DataError, match="exhausted"):
        prepared.batch(8)


def test_exhausted_data_is_refused():
    loader = loader_of(10, 4, 1, 0, 1, 1000)
    assert positions(loader, 4) == [4, 5, 6, 7]
    with pytest.raises(DataError, match="exhausted: the batch needs samples 8 to 11, found 10"):
        loader.batch(8)


def test_an_id_outside_the_vocabulary_is_refused():
    loader = loader_of(4, 4, 1, 0, 1, 33)
    with pytest.raises(
        DataError, match=r"expected ids 0 to 32, found token id 33 in sample 3: set model\.vocab_size"
    ):
        loader.batch(0)
    assert loader_of(4, 4, 1, 0, 1, 34).batch(0)


@pytest.mark.parametrize("batch, micro, dp", [(6, 2, 2), (0, 1, 1), (4, 3, 1)])
def test_a_batch_that_does_not_divide_is_refused(batch, micro, dp):
    with pytest.raises(DataError, match=f"batch of {batch} samples does not divide over {dp} .* x {micro}"):
        loader_of(9, batch, micro, 0, dp, 10)


def test_a_rank_outside_is_refused():
    with pytest.raises(DataError, match="dp_rank: expected 0 to 1, found 2"):
        loader_of(9, 4, 1, 2, 2, 10)


def test_the_scan_names_the_first_bad_token(golden, monkeypatch):
    monkeypatch.setattr("megalite.data.loader._SCAN_TOKENS", 2)
    check_vocabulary(golden, 7)
    with pytest.raises(
        DataError, match=r"data\.bin: vocabulary: expected ids 0 to 5, found token id 6 at token 7"
    ):
        check_vocabulary(golden, 6)
    check_vocabulary(golden, 6, max_tokens=7)
