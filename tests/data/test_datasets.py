import pytest

from megalite.data.blend import BlendedDataset
from megalite.data.datasets import build_datasets
from megalite.data.error import DataError
from megalite.data.gpt_dataset import GPTDataset

PLAIN = {"split": "8,2", "seq_length": 4, "train_samples": 6, "validation_samples": 3, "seed": 5}


@pytest.fixture
def prefixes(write_dataset):
    return [write_dataset([[100 * k + d] * 5 for d in range(10)], f"part{k}").prefix for k in range(2)]


def sequences_of(dataset):
    return {int(token) for i in range(len(dataset)) for token in dataset[i]}


def test_one_prefix_is_split_into_training_and_validation(prefixes):
    train, validation, _ = build_datasets(prefixes[:1], **PLAIN)
    assert isinstance(train, GPTDataset) and len(train) >= 6 and len(validation) >= 3
    assert sequences_of(train) <= set(range(8)) and sequences_of(validation) <= {8, 9}


def test_own_validation_files_are_used_whole(prefixes):
    train, validation, _ = build_datasets(
        prefixes[:1], prefixes[1:], **{**PLAIN, "split": "nonsense is not read"}
    )
    assert train.bounds == validation.bounds == (0, 10)
    assert sequences_of(validation) <= set(range(100, 110))


def test_no_validation_when_no_samples_are_wanted(prefixes):
    assert build_datasets(prefixes[:1], **{**PLAIN, "validation_samples": 0, "split": "1"})[1] is None


def test_a_split_without_validation_is_refused_when_samples_are_wanted(prefixes):
    with pytest.raises(
        DataError, match=r"part0: data\.split '1' leaves nothing for validation: give it a weight"
    ):
        build_datasets(prefixes[:1], **{**PLAIN, "split": "1"})


def test_weights_blend_datasets_of_exactly_their_targets(prefixes):
    train, validation, _ = build_datasets(["3", prefixes[0], "1", prefixes[1]], **PLAIN)
    assert isinstance(train, BlendedDataset) and len(train) == 5 + 2 and len(validation) == 3 + 1
    assert [indexed.prefix for indexed in train.indexed_datasets] == prefixes


def test_without_weights_each_dataset_gives_one_epoch_at_most(prefixes):
    train, *_ = build_datasets(prefixes, **{**PLAIN, "train_samples": 1000, "validation_samples": 0})
    assert len(train) == 2 * ((8 * 5 - 1) // 4)


def test_a_lone_weight_matters_only_where_megatron_blends_it(prefixes):
    blended, *_ = build_datasets(["1", prefixes[0]], **PLAIN)
    plain, *_ = build_datasets(["1", prefixes[0]], prefixes[1:], **PLAIN)
    assert isinstance(blended, BlendedDataset) and isinstance(plain, GPTDataset)


def test_weights_without_a_count_are_refused(prefixes):
    with pytest.raises(DataError, match="need a number of samples"):
        build_datasets(["1", prefixes[0]], **{**PLAIN, "train_samples": None})
