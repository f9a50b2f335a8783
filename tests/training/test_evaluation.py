"""The harness on the model in training gives the numbers of its own `hf` model on the export, in any layout.

Tolerance: the harness's numbers are means of few log-likelihoods in fp32, which differ by roundings; what is
counted (accuracies, exact matches) is the same.
"""

from pathlib import Path

import pytest
import torch

from megalite.config.load import dump_run
from megalite.config.run import CheckpointConfig, RunConfig
from megalite.training.checkpoints import Checkpoints
from megalite.training.engine import initialize_communication
from megalite.training.evaluation import LiveEvaluation
from megalite.training.trainer import StageTrainer, build_context
from megalite.training.world import JobError
from tests.evaluation.harness_tasks import TASKS
from tests.evaluation.test_harness import Place, lm_eval, local_tasks_only, theirs  # noqa: F401, fixtures
from tests.harness import run_distributed
from tests.trainers import Case, deepspeed_config

LAYOUTS = {
    "plain": [Case(zero=0), Case(tp=2, zero=1), Case(pp=2), Case(dp=2), Case(tp=2, pp=2)],
    "experts": [Case(dp=2, ep=2), Case(tp=2, zero=1)],
}


def live_run(place: Place, case: Case, folder: Path) -> RunConfig:
    """As the place's run, with its weights, in a layout."""
    logging = {
        "evaluate_every_steps": 1,
        "evaluate_tasks": list(TASKS),
        "evaluate_task_folder": str(place.tasks),
    }
    model = theirs_model(place)
    return RunConfig.model_validate(
        {
            "model": model,
            "parallel": {"tp_size": case.tp, "pp_size": case.pp, "ep_size": case.ep},
            "data": {"tokenizer": "bytes", "seq_length": 16},
            "logging": logging,
            "checkpoint": CheckpointConfig(start_from=str(place.run / "checkpoints")).model_dump(),
            "output_dir": str(folder),
        }
    )


def theirs_model(place: Place) -> dict:
    from megalite.checkpoint.load import find_checkpoint, read_config

    return read_config(find_checkpoint(place.run)).model.model_dump()


def evaluate_cases(rank: int, runs: list[tuple[Case, RunConfig]]) -> list[dict[str, float]]:
    initialize_communication()
    found = []
    for case, run in runs:
        evaluation = LiveEvaluation(run, rank, lambda text: None)
        deepspeed = deepspeed_config(case)
        trainer = StageTrainer(run, deepspeed, build_context(run, rank, case.world_size, torch.device("cpu")))
        Checkpoints(run, deepspeed, rank, lambda text: None).resume(trainer.engine)
        found.append(evaluation(trainer))
    return found


@pytest.mark.usefixtures("local_tasks_only")
@pytest.mark.parametrize("variant", LAYOUTS)
def test_the_numbers_are_those_of_the_export(tmp_path, lm_eval, variant):  # noqa: F811
    place = Place(tmp_path, variant)
    wanted = {f"evaluation/{task}/{metric}": value for (task, metric), value in theirs(place).items()}
    assert len(wanted) == 6
    for world_size in (1, 2, 4):
        cases = [case for case in LAYOUTS[variant] if case.world_size == world_size]
        if not cases:
            continue
        runs = [(case, live_run(place, case, tmp_path / str(case))) for case in cases]
        first, *others = run_distributed(evaluate_cases, world_size, runs, timeout_seconds=280)
        assert all(found == {} for each in others for found in each)
        for case, found in zip(cases, first, strict=True):
            assert found == pytest.approx(wanted, rel=1e-5), case


def open_evaluation(rank: int, run: RunConfig) -> str:
    try:
        LiveEvaluation(run, rank, lambda text: None)
    except JobError as error:
        return str(error)
    return ""


@pytest.mark.usefixtures("local_tasks_only")
def test_a_task_that_is_not_known_is_told_before_training_on_every_rank(tmp_path, lm_eval):  # noqa: F811
    run = RunConfig.model_validate(
        {
            "data": {"tokenizer": "bytes"},
            "logging": {"evaluate_every_steps": 5, "evaluate_tasks": ["tiny_chioce"]},
        }
    )
    first, second = run_distributed(open_evaluation, 2, run)
    assert first == second and "there is no task tiny_chioce" in first
    assert dump_run(run)
