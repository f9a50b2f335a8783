"""The harness on the model in training gives the numbers of its own `hf` model on the export, in any layout.

Tolerance: the harness's numbers are means of few log-likelihoods in fp32, which differ by roundings; what is
counted (accuracies, exact matches) is the same.
"""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megalite.config.checkpoint import CheckpointConfig
from megalite.config.run import RunConfig
from megalite.training.checkpoints import Checkpoints
from megalite.training.engine import initialize_communication
from megalite.training.evaluation import LiveEvaluation
from megalite.training.live_model import LiveModel
from megalite.training.trainer import StageTrainer, build_context
from megalite.training.world import JobError
from tests.evaluation.harness_tasks import TASKS, write_tasks
from tests.evaluation.test_harness import Place, lm_eval, local_tasks_only, theirs  # noqa: F401, fixtures
from tests.harness import run_distributed
from tests.reference import learning_rate_of
from tests.trainers import MICRO_BATCH, Case, deepspeed_config, micro_batches

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


def random_states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def train_and_evaluate(rank: int, case: Case, run: RunConfig, evaluates: bool) -> tuple:
    """Losses and norms, weights, random states; and of the evaluations numbers and rows asked for at once."""
    initialize_communication()
    rows: list[int] = []
    spread = LiveModel._spread

    def counted(live: LiveModel, ids: torch.Tensor, starts: torch.Tensor | None):
        rows.append(len(ids))
        return spread(live, ids, starts)

    LiveModel._spread = counted
    evaluation = LiveEvaluation(run, rank, lambda text: None) if evaluates else None
    context = build_context(run, rank, case.world_size, torch.device("cpu"))
    trainer = StageTrainer(run, deepspeed_config(case), context)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(rank)
    curve, found = [], []
    for step in range(3):
        result = trainer.train_step(micro_batches(step, context, case), learning_rate_of(step))
        curve.append((result.loss, result.grad_norm))
        if evaluation:
            found += [evaluation(trainer), evaluation(trainer)]
    weights = [p.ds_tensor.tolist() for p in trainer.engine.module.parameters()]
    return (curve, weights, random_states()), found, rows


@pytest.mark.usefixtures("local_tasks_only")
def test_training_goes_on_bit_for_bit_and_an_evaluation_can_be_repeated(tmp_path, lm_eval):  # noqa: F811
    case = Case(pp=2)
    run = live_run(Place(tmp_path, "plain"), case, tmp_path / "live")
    undisturbed = run_distributed(train_and_evaluate, 2, case, run, False)
    evaluated = run_distributed(train_and_evaluate, 2, case, run, True, timeout_seconds=280)
    assert [trained for trained, _, _ in evaluated] == [trained for trained, _, _ in undisturbed]
    (_, found, rows), _ = evaluated
    assert found[0::2] == found[1::2] and found[0] != found[2]
    assert max(rows) == MICRO_BATCH


def open_evaluations(rank: int, runs: list[RunConfig]) -> list[str]:
    return [open_evaluation(rank, run) for run in runs]


def open_evaluation(rank: int, run: RunConfig) -> str:
    try:
        LiveEvaluation(run, rank, lambda text: None)
    except JobError as error:
        return str(error)
    return ""


def mistaken_run(folder: str | None = None, tasks: str = "tiny_choice", **model) -> RunConfig:
    logging = {"evaluate_every_steps": 5, "evaluate_tasks": [tasks], "evaluate_task_folder": folder}
    return RunConfig.model_validate({"model": model, "data": {"tokenizer": "bytes"}, "logging": logging})


@pytest.mark.usefixtures("local_tasks_only")
def test_a_mistake_is_told_before_training_on_every_rank_by_the_key_of_the_run(tmp_path, lm_eval):  # noqa: F811
    tasks = str(write_tasks(tmp_path / "tasks", lambda text: text))
    without_data = write_tasks(tmp_path / "without data", lambda text: text)
    (without_data / "data.jsonl").unlink()
    wanted = {
        "logging.evaluate_tasks: there is no task tiny_chioce": mistaken_run(tasks, "tiny_chioce"),
        "logging.evaluate_task_folder: there is no folder no": mistaken_run("no"),
        "logging.evaluate_tasks: the data of tiny_choice cannot be had": mistaken_run(str(without_data)),
        "bytes has 257 ids and model.vocab_size is 200: name": mistaken_run(tasks, vocab_size=200),
    }
    first, second = run_distributed(open_evaluations, 2, list(wanted.values()))
    assert first == second
    for told, part in zip(first, wanted, strict=True):
        assert part in told and "--" not in told and "\n" not in told
