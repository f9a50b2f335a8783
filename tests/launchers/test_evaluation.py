"""A run that is evaluated while it goes on: what a user sees and finds, and what is told before training."""

from pathlib import Path

import pytest

from tests.evaluation.harness_tasks import write_tasks
from tests.launchers.conftest import ZERO3
from tests.launchers.jobs import Ended, Job, deepspeed, read_rows

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'megalite[eval]'")


def start(prefix: str, folder: Path, *overrides: str) -> Ended:
    """Two stages under ZeRO-3, four steps."""
    command = deepspeed(
        2,
        "--deepspeed_config",
        ZERO3,
        "model.num_hidden_layers=2",
        "model.hidden_size=32",
        "parallel.pp_size=2",
        "schedule.num_steps=4",
        "schedule.warmup_steps=1",
        "checkpoint.save_at_end=false",
        "data.tokenizer=bytes",
        f"data.train={prefix}",
        f"output_dir={folder}/run",
        "logging.evaluate_every_steps=2",
        f"logging.evaluate_task_folder={folder}/tasks",
        *overrides,
    )
    with Job(command, folder, HF_HUB_OFFLINE="1") as job:
        return job.wait(240)


def test_steps_that_are_due_tell_the_numbers_of_the_tasks(prefix: str, tmp_path: Path):
    write_tasks(tmp_path / "tasks", lambda text: text)
    end = start(prefix, tmp_path, "logging.evaluate_tasks=[tiny_choice]", "logging.evaluate_limit=4")
    assert (end.returncode, end.errors) == (0, [])
    rows = read_rows(tmp_path / "run")
    evaluated = [row["step"] for row in rows if "evaluation/tiny_choice/acc" in row]
    assert evaluated == [2, 4]
    assert all(row["evaluation/tiny_choice/acc"] in (0, 0.25, 0.5, 0.75, 1) for row in rows[1::2])
    assert "| tiny_choice | 0        | acc " in end.stdout


def test_a_task_that_is_not_known_is_one_line_before_the_first_step(prefix: str, tmp_path: Path):
    write_tasks(tmp_path / "tasks", lambda text: text)
    end = start(prefix, tmp_path, "logging.evaluate_tasks=[tiny_chioce]")
    assert end.returncode != 0
    assert len(end.errors) == 1 and "there is no task tiny_chioce: did you mean tiny_choice" in end.errors[0]
    assert not read_rows(tmp_path / "run")
