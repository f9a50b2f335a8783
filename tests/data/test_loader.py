import numpy as np
import pytest
import torch

from megalite.data.error import DataError
from megalite.data.loader import BatchLoader, check_vocabulary

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


def positions(loader, consumed):
    return [int(row[0]) // 10 for inputs, _ in loader.batch(consumed) for row in inputs]


def test_labels_are_the_inputs_one_token_on():
    [(inputs, labels)] = BatchLoader(Counting(8), 4, 1, 1, 2, 1000).batch(4)
    assert inputs.tolist() == [[60, 61, 62], [70, 71, 72]] and labels.tolist() == [[61, 62, 63], [71, 72, 73]]
    assert inputs.dtype == labels.dtype == torch.int64


def test_document_starts_come_with_their_samples_when_they_are_wanted():
    loader = BatchLoader(Counting(8), 4, 2, 0, 1, 1000, mask_documents=True)
    assert [starts.tolist() for _, _, starts in loader.batch(4)] == [
        [[0, 0, 4], [0, 0, 5]],
        [[0, 0, 6], [0, 0, 7]],
    ]


@pytest.mark.parametrize("dp_size, num_micro_batches", DIVISIONS)
@pytest.mark.parametrize("consumed", [0, 12, 24, 5])
def test_a_rank_reads_its_slice_whatever_the_micro_batch_is(dp_size, num_micro_batches, consumed):
    seen = []
    for rank in range(dp_size):
        loader = BatchLoader(Counting(36), 12, num_micro_batches, rank, dp_size, 1000)
        mine = positions(loader, consumed)
        assert mine == positions(BatchLoader(Counting(36), 12, 1, rank, dp_size, 1000), consumed)
        assert len(loader.batch(consumed)) == num_micro_batches
        seen += mine
    assert seen == list(range(consumed, consumed + 12))


def test_a_batch_depends_on_its_position_only():
    loader = BatchLoader(Counting(36), 4, 1, 0, 1, 1000)
    later_first = positions(loader, 8), positions(loader, 0), positions(loader, 8)
    assert later_first == ([8, 9, 10, 11], [0, 1, 2, 3], [8, 9, 10, 11])


def test_exhausted_data_is_refused():
    loader = BatchLoader(Counting(10), 4, 1, 0, 1, 1000)
    assert positions(loader, 4) == [4, 5, 6, 7]
    with pytest.raises(DataError, match="exhausted: the batch needs samples 8 to 11, found 10"):
        loader.batch(8)


def test_an_id_outside_the_vocabulary_is_refused():
    loader = BatchLoader(Counting(4), 4, 1, 0, 1, vocab_size=33)
    with pytest.raises(
        DataError, match=r"expected ids 0 to 32, found token id 33 in sample 3: set model\.vocab_size"
    ):
        loader.batch(0)
    assert BatchLoader(Counting(4), 4, 1, 0, 1, vocab_size=34).batch(0)


@pytest.mark.parametrize("batch, micro, dp", [(6, 2, 2), (0, 1, 1), (4, 3, 1)])
def test_a_batch_that_does_not_divide_is_refused(batch, micro, dp):
    with pytest.raises(DataError, match=f"batch of {batch} samples does not divide over {dp} .* x {micro}"):
        BatchLoader(Counting(9), batch, micro, 0, dp, 10)


def test_a_rank_outside_is_refused():
    with pytest.raises(DataError, match="dp_rank: expected 0 to 1, found 2"):
        BatchLoader(Counting(9), 4, 1, 2, 2, 10)


def test_the_scan_names_the_first_bad_token(golden, monkeypatch):
    monkeypatch.setattr("megalite.data.loader._SCAN_TOKENS", 2)
    check_vocabulary(golden, 7)
    with pytest.raises(
        DataError, match=r"data\.bin: vocabulary: expected ids 0 to 5, found token id 6 at token 7"
    ):
        check_vocabulary(golden, 6)
    check_vocabulary(golden, 6, max_tokens=7)
