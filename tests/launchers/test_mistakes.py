"""What a user can get wrong: one clear line on stderr, a status that is not 0, and nothing left behind."""

import multiprocessing
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

import megalite.training.job  # noqa: F401, what main() imports late, children need not import again
from launchers import pretrain
from tests.launchers.conftest import ZERO3
from tests.launchers.jobs import LAUNCHER_NAMES, Ended, Job, deepspeed
from tests.ports import reserve_port


def run(arguments: list[str], folder: Path, **environment: str) -> Ended:
    """main() in a process of its own, which is forked: torch is imported already."""
    logs = [folder / "stdout", folder / "stderr"]
    process = multiprocessing.get_context("fork").Process(
        target=_child, args=(arguments, folder, logs, environment)
    )
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, *(log.read_text() for log in logs))


def _child(arguments: list[str], folder: Path, logs: list[Path], environment: dict[str, str]) -> None:
    for descriptor, log in zip((1, 2), logs, strict=True):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115, pytest's own are elsewhere
    for name in set(LAUNCHER_NAMES) - {"DS_ACCELERATOR"}:
        os.environ.pop(name, None)
    os.environ |= environment
    os.chdir(folder)
    sys.exit(pretrain.main(arguments))


def one_line(end: Ended) -> str:
    """The one line that a refused command says."""
    assert end.returncode != 0
    assert end.stdout == ""
    assert end.stderr.startswith("error: ") and end.stderr.count("\n") == 1, end.stderr
    return end.stderr


def rank_0_of(world_size: int) -> dict[str, str]:
    numbers = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "MASTER_PORT": str(reserve_port()),
    }
    return numbers | {"MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("world_size", "arguments", "parts"),
    [
        (6, ["parallel.tp_size=2", "parallel.pp_size=2"], ["6 processes", "tp_size 2 x pp_size 2", "of 4"]),
        (3, ["parallel.tp_size=3"], ["num_attention_heads 8 is not divisible by parallel.tp_size 3"]),
        (5, ["parallel.pp_size=5"], ["pp_size 5 exceeds model.num_hidden_layers 4", "at most 4 stages"]),
        (
            3,
            ["parallel.pp_size=3", "parallel.pipeline_schedule=zbv"],
            ["pp_size 3 x 2 chunks of pipeline_schedule zbv exceeds model.num_hidden_layers 4", "at most 4"],
        ),
        (
            2,
            ["parallel.pp_size=2", "parallel.layers_per_stage=[1,2,1]"],
            ["layers_per_stage has 3 numbers", "pp_size 2 x 1 chunks", "are 2 stages: give one number"],
        ),
        (
            2,
            ["parallel.pp_size=2", "parallel.layers_per_stage=[3,2]"],
            ["layers_per_stage adds up to 5", "num_hidden_layers is 4: share out all"],
        ),
        (2, ["parallel.layers_per_stage=[4,0]"], ["layers_per_stage", "0", "greater than 0"]),
        (2, ["parallel.pp_size=2", "parallel.num_chunks=2"], ["num_chunks is 2", "1f1b has 1: set"]),
        (
            2,
            ["parallel.pp_size=2", "parallel.pipeline_schedule=zb-h1", "lora.rank=4"],
            ["lora.rank 4 freezes weights", "pipeline_schedule zb-h1", "interleaved"],
        ),
        (
            1,
            ["fp8.recipe=rowwise", "model.intermediate_size=648"],
            ["fp8.recipe rowwise needs multiples of 16", "model.intermediate_size makes 648", "recipe=none"],
        ),
        (
            1,
            ["fp8.recipe=rowwise", "parallel.row_overlap_chunks=2"],
            ["row_overlap_chunks 2 multiplies in pieces", "recipe rowwise rounds whole tensors"],
        ),
        (1, ["kernels.attention=varlen"], ["varlen computes in bf16 or fp16", "says fp32: enable bf16"]),
        (1, ["kernels.gating=liger"], ["kernels.gating liger needs", "set kernels.gating=auto"]),
        (3, [], ["train_batch_size 16 is not divisible by", "2 x 3 data-parallel ranks = 6"]),
        (1, ["data.seq_length=512"], ["seq_length 512 exceeds model.max_position_embeddings 256"]),
        (1, ["parallel.tensor_size=2"], ["unknown key 'parallel.tensor_size' on the command", "tp_size'?"]),
        (1, ["batch_size=4"], ["two places", "'batch_size' on the command line", "train_batch_size", ZERO3]),
        (1, ["schedule.num_steps"], ["'schedule.num_steps' is not understood", "section.key=value"]),
        (1, ["schedule.num_steps=many"], ['schedule.num_steps is "many"', "whole number"]),
        (1, ["--config", "nowhere.yaml"], ["nowhere.yaml not found", "--config"]),
        (1, ["--deepspeed_config", "nowhere.json"], ["nowhere.json not found", "--deepspeed_config"]),
        (1, ["--deepspeed-conf", "x"], ["--deepspeed-conf", "--help"]),
        (1, ["--deepspeed_config"], ["--deepspeed_config: expected one argument", "--help"]),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_one_line(world_size, arguments, parts, tmp_path):
    every = ["--deepspeed_config", ZERO3, "output_dir=run", *arguments]
    line = one_line(run(every, tmp_path, **rank_0_of(world_size)))
    assert all(part in line for part in parts), line
    assert not (tmp_path / "run").exists()


def test_the_deepspeed_json_is_required(tmp_path):
    assert "--deepspeed_config" in one_line(run([], tmp_path))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"WORLD_SIZE": None}, "has RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT but not WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": "2"}, "RANK 2 of WORLD_SIZE 1"),
    ],
)
def test_a_half_set_environment_is_one_line(changes, text, tmp_path):
    environment = {name: value for name, value in (rank_0_of(1) | changes).items() if value is not None}
    assert text in one_line(run(["--deepspeed_config", ZERO3], tmp_path, **environment))


def test_a_port_that_is_taken_is_one_line(tmp_path):
    with socket.create_server(("", 0)) as other_job:
        port = str(other_job.getsockname()[1])
        end = run(["--deepspeed_config", ZERO3], tmp_path, **rank_0_of(1) | {"MASTER_PORT": port})
    line = one_line(end)
    assert f"127.0.0.1:{port}: address already in use" in line and "--master_port" in line


def test_fp16_on_a_cpu_is_one_line(tmp_path):
    fp16 = str(Path(ZERO3).with_name("zero3_fp16.json"))
    assert "fp16 needs a GPU" in one_line(run(["--deepspeed_config", fp16], tmp_path))


def remove_bin(prefix: Path) -> None:
    prefix.with_suffix(".bin").unlink()


def remove_idx(prefix: Path) -> None:
    prefix.with_suffix(".idx").unlink()


def truncate_bin(prefix: Path) -> None:
    os.truncate(prefix.with_suffix(".bin"), 1000)


def truncate_idx(prefix: Path) -> None:
    os.truncate(prefix.with_suffix(".idx"), 100)


def nothing(prefix: Path) -> None:
    """The data is right."""


@pytest.mark.parametrize(
    ("damage", "overrides", "parts"),
    [
        (remove_bin, [], ["data.bin", "found nothing"]),
        (remove_idx, [], ["data.idx", "found nothing"]),
        (truncate_bin, [], ["data.bin", "found 1000", "truncated"]),
        (truncate_idx, [], ["data.idx", "100 bytes", "damaged"]),
        (nothing, ["model.vocab_size=100"], ["data.bin", "expected 0 to 99", "model.vocab_size"]),
        (nothing, ["data.split=1,0,0"], ["'1,0,0' leaves nothing for validation", "validate_every_steps=0"]),
        (nothing, ["data.split=100000,1,0"], ["validation split is empty"]),
        (nothing, ["data.validation=other"], ["other.idx", "found nothing"]),
    ],
)  # fmt: skip
def test_wrong_data_is_one_line_and_makes_no_folder(damage, overrides, parts, prefix, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{prefix}{suffix}", tmp_path / f"data{suffix}")
    damage(tmp_path / "data")
    arguments = ["--deepspeed_config", ZERO3, "data.train=data", "output_dir=run", *overrides]
    line = one_line(run(arguments, tmp_path))
    assert all(part in line for part in parts), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("output_dir", ["file/run", "/proc/run"])
@pytest.mark.parametrize("data", ["given", "default"])
def test_a_folder_that_cannot_be_written_is_one_line(output_dir, data, prefix, tmp_path):
    (tmp_path / "file").touch()
    overrides = [f"output_dir={output_dir}"] + ([f"data.train={prefix}"] if data == "given" else [])
    line = one_line(run(["--deepspeed_config", ZERO3, *overrides], tmp_path))
    assert f"output_dir {output_dir} cannot be written" in line


def test_a_checkpoint_of_another_model_is_one_line(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted.folder, tmp_path / "run")
    before = (tmp_path / "run/config.yaml").read_text()
    _, _, *overrides = uninterrupted.arguments
    changes = ["parallel.tp_size=1", "parallel.pp_size=1", "model.intermediate_size=320", "output_dir=run"]
    end = run(["--deepspeed_config", ZERO3, *overrides, *changes], tmp_path)
    line = one_line(end)
    assert "checkpoint" in line
    assert (tmp_path / "run/config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["parallel.pp_size=3"], "2 processes"),
        (["model.vocab_size=100"], "expected 0 to 99"),
    ],
)
def test_of_two_ranks_under_the_launcher_one_speaks(overrides, text, prefix, tmp_path):
    command = deepspeed(2, "--deepspeed_config", ZERO3, f"data.train={prefix}", "output_dir=run", *overrides)
    with Job(command, tmp_path) as job:
        end = job.wait(60)
        assert job.leftovers() == []
    assert end.returncode != 0
    assert end.stderr.startswith("error: ") and end.stderr.count("\n") == 1, end.stderr
    assert text in end.stderr and "rank" not in end.stderr
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_gpus_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.delenv("DS_ACCELERATOR")
    environment = rank_0_of(2) | {"RANK": "1", "LOCAL_RANK": "1"}
    line = one_line(run(["--deepspeed_config", ZERO3], tmp_path, **environment))
    assert "local rank 1 of this node has no GPU, there are 1" in line and "DS_ACCELERATOR=cpu" in line
