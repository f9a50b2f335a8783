"""Damaged pairs, a thousand and more: each is refused in one line, or gives what was written."""

import numpy as np
import pytest

from megalite.data.error import DataError
from megalite.data.gpt_dataset import GPTDataset
from megalite.data.indexed_dataset import HEADER, IndexedDataset, bin_path, idx_path
from megalite.data.indexed_writer import IndexedDatasetWriter

CASES_OF_A_KIND = 200


@pytest.fixture
def pair(tmp_path):
    """A sound .bin and .idx: documents of none, one and several sequences."""
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(tmp_path / "sound") as writer:
        for size in random.integers(0, 4, 12):
            writer.add_document([random.integers(0, 1000, n) for n in random.integers(1, 9, size)])
    return [path(tmp_path / "sound").read_bytes() for path in (bin_path, idx_path)]


def flip(random, data, start, stop):
    """One byte of [start, stop) becomes another."""
    place = int(random.integers(start, stop))
    return data[:place] + bytes([data[place] ^ int(random.integers(1, 256))]) + data[place + 1 :]


def cut(random, data):
    return data[: random.integers(0, len(data))]


def number(random, data, place):
    """A count or an offset becomes anything, negative and huge numbers included."""
    value = int(random.choice([-1, 0, 1, 2**31, 2**62, -(2**63), int(random.integers(-(2**40), 2**40))]))
    return data[:place] + value.to_bytes(8, "little", signed=True) + data[place + 8 :]


def entry(random, data):
    return HEADER.size + 4 * int(random.integers(0, (len(data) - HEADER.size) // 4 - 1))


DAMAGE = {
    "a byte of the header": lambda r, data, idx: (data, flip(r, idx, 0, HEADER.size)),
    "a byte of the index": lambda r, data, idx: (data, flip(r, idx, HEADER.size, len(idx))),
    "truncated index": lambda r, data, idx: (data, cut(r, idx)),
    "truncated ids": lambda r, data, idx: (cut(r, data), idx),
    "extended ids": lambda r, data, idx: (data + r.bytes(int(r.integers(1, 9))), idx),
    "extended index": lambda r, data, idx: (data, idx + r.bytes(int(r.integers(1, 9)))),
    "counts": lambda r, data, idx: (data, number(r, idx, int(r.choice([18, 26])))),
    "entries": lambda r, data, idx: (data, number(r, idx, entry(r, idx))),
    "swapped": lambda r, data, idx: (idx, data),
    "noise": lambda r, data, idx: (data, r.bytes(int(r.integers(0, 300)))),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_in_one_line_or_harmless(pair, tmp_path, kind):
    random, refused = np.random.default_rng(len(kind)), 0
    sound = IndexedDataset(tmp_path / "sound")
    for _ in range(CASES_OF_A_KIND):
        data, index = DAMAGE[kind](random, *pair)
        bin_path(tmp_path / "p").write_bytes(data)
        idx_path(tmp_path / "p").write_bytes(index)
        try:
            opened = IndexedDataset(tmp_path / "p")
        except DataError as error:
            assert "\n" not in str(error) and str(tmp_path / "p") in str(error)
            refused += 1
            continue
        assert opened.sequence_lengths.tolist() == sound.sequence_lengths.tolist()
        assert opened.tokens.tolist() == sound.tokens.tolist()
        assert len(GPTDataset(opened, 4, 20, 1)[0]) == 5
    assert refused >= (0.6 if kind == "a byte of the index" else 0.9) * CASES_OF_A_KIND


def test_the_sound_pair_of_these_tests_opens(pair, tmp_path):
    assert IndexedDataset(tmp_path / "sound").num_documents == 12
