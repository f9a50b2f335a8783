import json
import re

import pytest

from megalite.data.datasets import build_datasets
from megalite.data.error import DataError
from megalite.data.fingerprint import check_same_data, describe_data
from megalite.data.indexed_dataset import bin_path, idx_path


@pytest.fixture
def prefixes(write_dataset):
    return [write_dataset([[10 * k + d] * 5 for d in range(8)], name).prefix for k, name in enumerate("abc")]


def describe(prefixes, weights=(0.7, 0.3), **changes):
    items = [str(x) for pair in zip(weights, prefixes, strict=False) for x in pair]
    settings = {"split": "6,2,0", "seq_length": 4, "train_samples": 8, "validation_samples": 4, "seed": 5}
    return describe_data(build_datasets(items, **{**settings, **changes}))


def refusal(before, now):
    with pytest.raises(DataError) as caught:
        check_same_data(json.loads(json.dumps(before)), now, "step-00000100")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_same_data_is_the_same_also_after_json(prefixes):
    before = json.loads(json.dumps(describe(prefixes[:2])))
    check_same_data(before, describe(prefixes[:2]), "here")
    assert [set(one) for one in before["train"]] == 2 * [
        {
            "prefix",
            "weight",
            "ids_sha256",
            "bin_bytes",
            "idx_bytes",
            "idx_sha256",
            "sequences",
            "seq_length",
            "epochs",
            "seed",
        }
    ]


def test_data_may_move(prefixes, tmp_path):
    before = describe(prefixes[:2])
    for path in (bin_path, idx_path):
        path(prefixes[0]).rename(path(tmp_path / "moved"))
    check_same_data(before, describe([tmp_path / "moved", prefixes[1]]), "here")


def test_a_longer_run_is_of_the_same_data(prefixes):
    check_same_data(describe(prefixes[:2], train_samples=7), describe(prefixes[:2], train_samples=40), "here")


def test_more_validation_is_the_same_data(prefixes):
    check_same_data(describe(prefixes[:2]), describe(prefixes[:2], validation_samples=40), "here")
    check_same_data(describe(prefixes[:2]), describe(prefixes[:2], validation_samples=0), "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "train dataset 1 of 2 .*a.: seed: expected 5, found 6"),
        ({"seq_length": 3}, "seq_length: expected 4, found 3"),
        ({"split": "4,4,0"}, r"sequences: expected \[0, 6\], found \[0, 4\]"),
        ({"weights": (0.6, 0.4)}, "weight: expected 0.7, found 0.6"),
    ],
    ids=str,
)
def test_another_order_of_samples_is_refused(prefixes, changes, message):
    text = refusal(describe(prefixes[:2]), describe(prefixes[:2], **changes))
    assert re.search(message, text), text


def test_other_files_are_refused(prefixes, write_dataset):
    before = describe(prefixes[:2])
    assert "train: expected 2 datasets, found 3" in refusal(before, describe(prefixes, weights=(7, 3, 1)))
    longer = write_dataset([[1] * 5] * 9, "longer").prefix
    assert "train dataset 2 of 2" in refusal(before, describe([prefixes[0], longer]))
    other_lengths = write_dataset([[1] * 4, [1] * 6] * 4, "other").prefix  # as many sequences and tokens
    assert "idx_sha256: expected" in refusal(before, describe([prefixes[0], other_lengths]))


def test_what_has_no_record_is_not_compared(prefixes):
    check_same_data({}, describe(prefixes[:2]), "a checkpoint made by conversion")
