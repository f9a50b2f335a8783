import json

import numpy as np
import pytest

from megalite.config.load import load_run
from megalite.data.fingerprint import describe_data
from megalite.data.indexed_writer import IndexedDatasetWriter
from megalite.data.past import Past
from megalite.training.samples import build_samples, open_cache
from tools.build_index import main


@pytest.fixture
def arguments(tmp_path):
    """The command line of a small blended run."""
    for name, length in {"a": 10, "b": 20}.items():
        with IndexedDatasetWriter(tmp_path / name) as writer:
            writer.add_documents(np.arange(50 * length) % 250, np.full(50, length))
    config = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    data = f"data.train=[3, {tmp_path}/a, 1, {tmp_path}/b]"
    return ["--deepspeed_config", f"{tmp_path}/ds.json", data, "data.seq_length=8", "schedule.num_steps=20"]


def test_a_run_finds_what_was_built_ahead(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "train: 40 samples, 2 files" in said and f"{tmp_path}/cache: 6 indices built, 0 found" in said
    run = load_run(None, arguments[2:])
    cache = open_cache(run)
    build_samples(run, 2, cache)
    assert (cache.num_found, cache.num_built) == (6, 0)
    assert main(arguments) == 0
    assert "0 indices built, 6 found" in capsys.readouterr().out


def test_what_is_damaged_is_told_and_mended(arguments, tmp_path, capsys):
    main(arguments)
    next(tmp_path.glob("cache/*/shuffle.raw")).write_bytes(b"damaged")
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "warning: " in said.err and "built again" in said.err and "1 indices built, 5 found" in said.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.train=nowhere", "nowhere.idx: file: expected it to exist"),
        ("data.train=null", "data.train is null"),
        ("data.trian=x", "did you mean 'data.train'?"),
        ("data.split='0,1,1'", "leaves nothing for train"),
        ("data.cache_dir=/proc/none", "/proc/none: cannot be written: name another folder"),
    ],
)
def test_a_users_mistake_is_one_line(arguments, capsys, change, message):
    assert main([*arguments, change]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_batch_size_may_follow_from_the_number_of_ranks(arguments, tmp_path, capsys):
    """2 samples of each of 4 replicas, on 8 ranks of 2 stages: as a run of 8 samples per step."""
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert main(arguments) == 2
    assert f"not known before the launch: state it in {tmp_path}/ds.json" in capsys.readouterr().err
    assert main([*arguments, "--num_ranks", "8", "parallel.pp_size=2"]) == 0
    assert "train: 160 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_ranks", "message"),
    [("0", "--num_ranks is 0"), ("3", "3 processes cannot be divided into tp_size 2")],
)
def test_ranks_that_the_layout_does_not_fit_are_one_line(arguments, capsys, num_ranks, message):
    assert main([*arguments, "--num_ranks", num_ranks, "parallel.tp_size=2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_help_says_what_to_do(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0 and "data.cache_dir" in capsys.readouterr().out


def test_a_run_that_goes_on_finds_the_indices_with_which_it_does(arguments, tmp_path):
    run = load_run(None, arguments[2:])
    datasets = build_samples(run, 2)
    state = {"step": 5, "consumed_samples": 10, "data": describe_data(datasets)}
    folder = tmp_path / "run" / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state))
    longer = [*arguments, "schedule.num_steps=200", f"output_dir={tmp_path}/run"]
    assert main(longer) == 0
    cache, past = open_cache(run), Past.of(state, "here")
    train = build_samples(load_run(None, longer[2:]), 2, cache, train_samples=400, past=past).train
    assert cache.num_built == 0 and train.datasets[0].single_epochs
