"""Steps that would spoil the weights are not taken, on any rank; and a run that went back misses nothing."""

import json
from dataclasses import replace
from math import inf, nan

import pytest
import torch

from megalite.batch import Batch
from megalite.checkpoint.load import TensorReader
from megalite.config.checkpoint import CheckpointConfig
from megalite.config.guard import GuardConfig
from megalite.config.logging import LoggingConfig
from megalite.config.schedule import ScheduleConfig
from megalite.measure.metrics import Metrics, Workload
from megalite.measure.progress import Progress
from megalite.training.checkpoints import Checkpoints, find_newest, live_pieces
from megalite.training.course import Course
from megalite.training.data import Data
from megalite.training.engine import initialize_communication
from megalite.training.guard import DivergedError, Guard
from megalite.training.loop import train
from megalite.training.saving import Saving
from megalite.training.trainer import StepResult
from megalite.training.zero import inner_optimizer
from megalite.watch.marks import Marks
from tests.harness import run_distributed
from tests.trainers import (
    ADAM,
    BATCH,
    MODEL,
    SEED,
    SEQ_LENGTH,
    Case,
    build_trainer,
    deepspeed_config,
    micro_batches,
    run_config,
)

# What is judged, and what becomes of it


def judged(guard, pairs, can_go_back=False, repeated=None):
    """Verdicts on steps of these losses and norms."""
    verdicts = []
    for step, (loss, norm) in enumerate(pairs, 1):
        is_taken = guard.objection(loss, norm) is None
        result = StepResult(loss, norm, is_taken=is_taken)
        again = result if repeated is None else StepResult(*repeated, is_taken=False)
        verdicts.append(guard.conclude(step, result, lambda again=again: again, lambda: can_go_back))
    return verdicts


CALM = [(2.0, 1.0), (2.2, 1.2), (1.8, 0.8), (2.0, 1.0)]


def test_a_number_that_is_none_is_never_taken():
    lines = []
    guard = Guard(GuardConfig(max_skipped_in_a_row=2), lines.append)
    assert judged(guard, [(2.0, 1.0), (nan, 1.0), (2.0, inf), (1e9, 1e9)]) == [
        "taken",
        "skipped",
        "skipped",
        "taken",
    ]
    same = "(computed again: the same)"
    assert lines == [f"step 2: loss nan {same}: skipped", f"step 3: gradient norm inf {same}: skipped"]
    assert guard.metrics() == {"skipped_steps": 2}
    with pytest.raises(
        DivergedError, match=r"step 3: loss nan \(computed again: the same\), and 2 steps before were skipped"
    ):
        judged(guard, [(nan, 1.0)] * 3)


def test_a_spike_is_measured_against_the_steps_before():
    config = GuardConfig(spike_sigma=3.0, window_steps=4)
    # mean 2, deviation 0.1414: up to 2.424; of the norm 1 and 0.1414
    for number, verdict in ((2.42, "taken"), (2.43, "skipped"), (0.1, "taken")):
        assert judged(Guard(config, print), [*CALM, (number, 1.0)])[-1] == verdict
    assert judged(Guard(config, print), [*CALM, (2.0, 1.43)])[-1] == "skipped"
    assert judged(Guard(config, print), [*CALM[:3], (99.0, 99.0)])[-1] == "taken"  # too few before
    assert judged(Guard(GuardConfig(), print), [*CALM, (99.0, 99.0)])[-1] == "taken"  # not asked for
    # what was skipped is not what the next ones are measured against
    assert judged(Guard(config, print), [*CALM, (99.0, 1.0), (98.0, 1.0)])[-2:] == ["skipped"] * 2


def test_a_run_goes_back_so_many_times_and_only_to_where_it_can():
    config = GuardConfig(spike_sigma=3.0, window_steps=4, on_spike="roll_back", max_rollbacks=2)
    guard = Guard(config, print)
    assert judged(guard, [*CALM, (9.0, 1.0)], can_go_back=False)[-1] == "skipped"
    assert judged(guard, [(9.0, 1.0), (2.0, 1.0), (9.0, 1.0), (9.0, 1.0)], can_go_back=True) == [
        "roll back",
        "taken",
        "roll back",
        "skipped",
    ]
    assert guard.metrics() == {"skipped_steps": 2, "rollbacks": 2}
    again = Guard(config, print)
    again.restore(guard.state())
    assert again.state() == guard.state() and again.metrics() == guard.metrics()
    assert judged(again, [(2.43, 1.0)])[-1] == "skipped"


def test_a_step_that_gives_another_number_when_it_is_computed_again_tells_of_a_device():
    lines = []
    judged(Guard(GuardConfig(), lines.append), [(nan, 1.0)], repeated=(2.5, 1.25))
    told = "loss 2.5, gradient norm 1.25: a device may be at fault"
    assert lines == [f"step 1: loss nan (computed again: {told}): skipped"]


def test_the_search_for_a_loss_scale_is_left_alone():
    guard = Guard(GuardConfig(max_skipped_in_a_row=0), print, scales_loss=True)
    assert judged(guard, [(2.0, inf)] * 3) == ["skipped"] * 3 and guard.metrics() == {}
    with pytest.raises(DivergedError):
        judged(guard, [(nan, inf)])


# What a step that is not taken leaves


CASES = [
    Case(zero=0),
    Case(tp=2, dp=2, zero=0),
    Case(tp=2, dp=2, zero=1, tied=True),
    Case(pp=2, dp=2, zero=2),
    Case(tp=2, pp=2, zero=3),
    Case(dp=2, zero=1, precision="bf16"),
    Case(dp=2, zero=3, precision="bf16"),
    Case(dp=2, ep=2, model_kind="experts"),
]
KINDS = ("objection of one rank", "no number")


def snapshot(trainer):
    return [piece.tensor.clone() for piece in live_pieces(trainer.engine)]


def steps_of(trainer):
    """That the optimizer has taken, as it counts them."""
    return [state["step"].item() for state in inner_optimizer(trainer.engine.optimizer).state.values()]


def poisoned(batches):
    """The same, with weights of the loss that are no numbers."""
    return [replace(batch, loss_weights=torch.full(batch.labels.shape, nan)) for batch in batches]


def train_over_a_step_that_is_not_taken(rank, case):
    """Per kind: numbers of the steps around it, and whether it left all state as it was."""
    initialize_communication()
    found = {}
    for kind in ("none", *KINDS):
        trainer = build_trainer(rank, case)
        curve, same = [], []
        for step in (1, 2, 3):
            batches = micro_batches(step, trainer.context)
            rate = ADAM.learning_rate * case.rate
            if step == 2 and kind != "none":
                before, steps = snapshot(trainer), steps_of(trainer)
                spoilt = poisoned(batches) if kind == "no number" else batches
                objects = lambda loss, norm: "no" if rank == case.world_size - 1 else None  # noqa: E731
                result = trainer.train_step(spoilt, rate, objects if kind == KINDS[0] else None)
                same = [a.equal(b) for a, b in zip(before, snapshot(trainer), strict=True)]
                same.append(steps == steps_of(trainer))
                assert not result.is_taken
            result = trainer.train_step(batches, rate, lambda loss, norm: None)
            assert result.is_taken
            curve.append((result.loss, result.grad_norm))
        found[kind] = curve, same
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_that_is_not_taken_changes_nothing(case):
    for found in run_distributed(train_over_a_step_that_is_not_taken, case.world_size, case):
        for kind in KINDS:
            curve, same = found[kind]
            assert all(same) and len(same) > 2, kind
            assert curve == found["none"][0], kind


# A run that goes back

NUM_STEPS, POISON, SAVE_EVERY = 24, 17 * BATCH + 3, 5


class Numbered:
    """Samples in order: runs of numbers, one of them noise."""

    def __init__(self, context, poison):
        self.rank, self.size, self.poison = context["dp"].rank, context["dp"].size, poison
        self.taken = []

    def batch(self, consumed):
        self.taken.append(consumed)
        each = BATCH // self.size
        ids = torch.stack([self._sample(consumed + self.rank * each + i) for i in range(each)])
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).split(each // 2)

    def _sample(self, number):
        if number == self.poison:
            return torch.randint(
                MODEL.vocab_size, (SEQ_LENGTH + 1,), generator=torch.Generator().manual_seed(9)
            )
        return (torch.arange(SEQ_LENGTH + 1) + number) % 5


class Never:
    def agree(self, own=None):
        return None


def run_guarded(rank, case, folder, guarded, poison, first_left_out=()):
    """Train through `loop.train`; the samples that were taken, the lines that were told, the last losses."""
    initialize_communication()
    watchful = GuardConfig(spike_sigma=3.0, window_steps=4, on_spike="roll_back")
    run = run_config(
        case,
        output_dir=str(folder),
        guard=watchful if guarded else GuardConfig(),
        checkpoint=CheckpointConfig(save_every_steps=SAVE_EVERY, keep_last=0),
        schedule=ScheduleConfig(num_steps=NUM_STEPS, warmup_steps=2),
        logging=LoggingConfig(validate_every_steps=0),
    )
    trainer = build_trainer(rank, case, seed=SEED)
    lines = []
    checkpoints = Checkpoints(run, deepspeed_config(case), rank, lines.append)
    saving = Saving(checkpoints, run.checkpoint, lines.append)
    batches = Numbered(trainer.context, poison)
    newest = find_newest(run, rank, lines.append)
    guard = Guard(run.guard, lines.append)
    guard.restore(newest.state.get("guard", {}))
    course = Course.after(newest.state, BATCH).leaving_out(first_left_out)
    checkpoints.resume(trainer.engine)
    data = Data(batches, None, {})
    metrics = open_metrics(folder) if rank == 0 else None
    train(trainer, data, run, course, guard, saving, Never(), metrics, mark=Marks("start-up"))
    last = trainer.evaluate(Numbered(trainer.context, None).batch(10_000)).mean
    return batches.taken, [line for line in lines if line.startswith("step")], last, guard.metrics()


def open_metrics(folder):
    workload = Workload(BATCH, SEQ_LENGTH, flops_per_token=1.0, peak_flops_per_second=1.0)
    return Metrics(folder, workload, Progress(NUM_STEPS, bar=False), tensorboard=False)


def consumed_in(folder):
    """Samples and tokens, as the rows of a run have them."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    return [(row["consumed_samples"], row["consumed_tokens"]) for row in rows]


def weights_of(folder):
    reader = TensorReader(folder / f"checkpoints/step-{NUM_STEPS:08d}")
    return [reader.read(entry.kind, entry.name) for entry in reader.manifest.tensors]


@pytest.mark.parametrize("case", [Case(tp=2, dp=2, zero=1), Case(pp=2, dp=2, zero=3)], ids=str)
def test_a_poisoned_sample_is_gone_back_over_and_left_out(case, tmp_path):
    everyone = run_distributed(run_guarded, case.world_size, case, tmp_path / "guarded", True, POISON)
    taken, lines, last, counts = everyone[0]
    assert all(one[:2] == (taken, lines) and one[3] == counts for one in everyone)
    (line,) = lines
    assert line.startswith("step 18: ") and line.endswith(": goes back, and leaves its samples out")
    assert counts == {"rollbacks": 1}
    in_order = [step * BATCH for step in range(NUM_STEPS + 1)]
    assert taken == [*in_order[:18], *in_order[15:17], *in_order[18:]]
    ends = [start + BATCH for start in (*in_order[:17], *in_order[18:])]  # what was left out is consumed
    expected_rows = [(end, end * SEQ_LENGTH) for end in ends]
    assert consumed_in(tmp_path / "guarded") == expected_rows

    # as a run that was told from its start to leave them out
    spoilt = (POISON // BATCH * BATCH, POISON // BATCH * BATCH + BATCH)
    told = run_distributed(run_guarded, case.world_size, case, tmp_path / "told", False, POISON, (spoilt,))[0]
    assert told[0] == [*in_order[:17], *in_order[18:]] and told[1] == []
    assert consumed_in(tmp_path / "told") == expected_rows
    ours, theirs = weights_of(tmp_path / "guarded"), weights_of(tmp_path / "told")
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))

    # without the guard the sample is learnt from
    control = run_distributed(run_guarded, case.world_size, case, tmp_path / "control", False, POISON)[0]
    assert control[0] == in_order[:NUM_STEPS] and control[1] == []
    assert consumed_in(tmp_path / "control") != expected_rows
    assert not all(a.equal(b) for a, b in zip(ours, weights_of(tmp_path / "control"), strict=True))
    assert control[2] > last
