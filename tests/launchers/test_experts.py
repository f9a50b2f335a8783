"""A run with experts, as a user starts it: what is recorded of them, and what a resumption finds."""

import shutil
from pathlib import Path

import pytest

from tests.launchers.conftest import ZERO3
from tests.launchers.jobs import Ended, Job, deepspeed, read_rows

NUM_STEPS, NUM_EXPERTS, NUM_CHOSEN = 6, 4, 2
TOKENS = 16 * 128  # of a step
RUN = [
    "--deepspeed_config",
    ZERO3,
    "model.num_hidden_layers=2",
    "model.hidden_size=32",
    f"model.n_routed_experts={NUM_EXPERTS}",
    f"model.num_experts_per_tok={NUM_CHOSEN}",
    "model.moe_intermediate_size=32",
    "model.n_shared_experts=1",
    "model.first_k_dense_replace=1",
    "parallel.tp_size=2",
    "parallel.ep_size=2",
    f"schedule.num_steps={NUM_STEPS}",
    "schedule.warmup_steps=1",
    "logging.validate_every_steps=3",
    "logging.validation_steps=1",
    "checkpoint.save_every_steps=3",
]


def start(prefix: str, folder: Path) -> Ended:
    """tensor 2 x experts 2 under ZeRO-3, in four ranks."""
    command = deepspeed(4, *RUN, f"data.train={prefix}", f"output_dir={folder}/run")
    with Job(command, folder) as job:
        return job.wait(240)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, prefix: str) -> tuple[Ended, Path]:
    """A run that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    return start(prefix, folder), folder / "run"


def test_the_start_says_what_a_token_uses(whole: tuple[Ended, Path]):
    end, _ = whole
    assert (end.returncode, end.errors) == (0, [])
    assert "active per token" in end.stdout
    assert "tensor 2 x pipeline 1 x data 2 (experts over 2 of these), sequence" in end.stdout


def test_every_step_tells_the_tokens_of_each_expert_and_their_biases(whole: tuple[Ended, Path]):
    rows = read_rows(whole[1])
    assert len(rows) == NUM_STEPS
    for step, row in enumerate(rows):
        assert row["expert_tokens"].keys() == {"1"}  # layer 0 is dense
        counts = row["expert_tokens"]["1"]
        assert len(counts) == NUM_EXPERTS and sum(counts) == TOKENS * NUM_CHOSEN
        assert row["expert_largest_violation"] == pytest.approx(max(counts) * NUM_EXPERTS / sum(counts) - 1)
        farthest = max(-row["expert_bias_min"], row["expert_bias_max"])
        assert farthest <= step * 1e-3 + 1e-9 and (farthest > 0) == (step > 0)


def test_a_resumed_run_routes_as_the_one_that_never_stopped(
    whole: tuple[Ended, Path], prefix: str, tmp_path: Path
):
    shutil.copytree(whole[1], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{NUM_STEPS:08}")
    end = start(prefix, tmp_path)
    assert "resumed from" in end.stdout and "trained 3 steps" in end.stdout
    timing = {"step_seconds", "tokens_per_second", "mfu", "save_stall_seconds"}
    resumed, expected = (
        [{name: value for name, value in row.items() if name not in timing} for row in read_rows(folder)]
        for folder in (tmp_path / "run", whole[1])
    )
    assert resumed == expected
