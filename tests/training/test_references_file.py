"""Log-probabilities are found again where all that they follow from is the same, and nowhere else."""

from types import SimpleNamespace

import pytest

from megalite.config.data import DataConfig
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from megalite.data.packing import SampleOrder
from megalite.training.chat_data import references_file

MODEL = ModelConfig(vocab_size=64)


def file_of(
    tmp_path, *, model=MODEL, start="weights", precision="fp32", seq_length=16, sha256="data", seed=1
):
    run = RunConfig(model=model, data=DataConfig(cache_dir=str(tmp_path)), seed=seed)
    order = SampleOrder(seq_length, seed, False, True)
    samples = SimpleNamespace(order=order, sources=[SimpleNamespace(sha256=sha256)], kind="pairs")
    return references_file(SimpleNamespace(dataset=samples), run, start, precision)


@pytest.mark.parametrize(
    "change",
    [
        {"model": MODEL.model_copy(update={"rope_theta": 1e6})},
        {"model": MODEL.model_copy(update={"rms_norm_eps": 1e-3})},
        {"start": "others"},
        {"precision": "bf16"},
        {"seq_length": 32},
        {"sha256": "other"},
    ],
    ids=str,
)
def test_whatever_changes_the_numbers_changes_the_name(tmp_path, change):
    assert file_of(tmp_path, **change) != file_of(tmp_path)


def test_what_does_not_change_pairs_does_not(tmp_path):
    assert file_of(tmp_path, seed=2) == file_of(tmp_path)
