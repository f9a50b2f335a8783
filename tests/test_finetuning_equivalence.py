"""Fine-tuning on a file of conversations, in every layout, is a plain loop of transformers in one process.

Our side is the whole path: files, chat template, prepared tokens, packing, this rank's batches, trainer. The
reference (tests/conversations.py, tests/reference.py) shares no code with it: transformers gives tokens and
masks, its model sees one conversation at a time, without neighbours or padding, and the sum of the losses of
all learnt tokens is divided by their number in the global batch. Only which conversations that batch has is
asked of our side. All runs are fp32 with clipping active.

Tolerances: an fp32 sum in another order costs about 1e-7 relative; 1e-5 at the first step is a hundred of
those, for the loss, the norm, and the difference of each gradient in proportion to its size. Adam divides by
the root of a second moment, so losses and norms may drift to ten times as much at the last step, as in
tests/test_equivalence.py. A mask that is off by one, or a neighbour that is seen, changes the loss by 5e-4
and gradients by far more; a mean per micro batch, the norm by half.

Rotary positions are relative: that they restart with each conversation changes roundings alone, which
tests/test_masking.py looks at.
"""

from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from megalite.config.data import DataConfig
from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.config.schedule import ScheduleConfig
from megalite.data.chat_loader import ChatLoader
from megalite.data.error import DataError
from megalite.data.loader import PreparedBatches
from megalite.training.checkpoints import Newest
from megalite.training.data import Data, open_data
from megalite.training.engine import initialize_communication
from megalite.training.trainer import StageTrainer, build_context
from tests.conversations import SEQ_LENGTH, conversations, model_of, tokens_of, write_conversations
from tests.harness import run_distributed
from tests.reference import (
    CLIP,
    Curve,
    WrittenOutAdamW,
    assert_same_numbers,
    learning_rate_of,
    transformers_model,
    under_our_names,
)
from tests.test_equivalence import first_gradients
from tests.trainers import BATCH, SEED, Case, deepspeed_config, run_config

NUM_STEPS = 3
Members = tuple[tuple[int, ...], ...]  # of each sample of a global batch, its conversations


@dataclass(frozen=True)
class Tuning:
    """A layout, and how conversations become batches; one sample per micro batch is the most uneven."""

    case: Case
    packing: bool = True
    micro_batch: int = 1  # samples

    def __str__(self) -> str:
        return f"{self.case},{'packed' if self.packing else 'apart'},micro batch {self.micro_batch}"


E = {"model_kind": "experts", "rule": "none"}  # whose biases stay, so that a batch may be taken apart
TUNINGS = [
    Tuning(Case(zero=0)),
    Tuning(Case(zero=3), packing=False, micro_batch=2),
    Tuning(Case(tp=2, zero=1), packing=False),
    Tuning(Case(tp=2, sp=False, zero=2, recompute="full"), micro_batch=2),
    Tuning(Case(pp=2, tied=True)),
    Tuning(Case(pp=2, zero=2, schedule="afab"), packing=False, micro_batch=2),
    Tuning(Case(dp=2), packing=False),
    Tuning(Case(dp=2, zero=0, tied=True), micro_batch=4),
    Tuning(Case(dp=2, zero=2, recompute="selective")),
    Tuning(Case(dp=2, ep=2, **E)),
    Tuning(Case(tp=2, pp=2), packing=False),
    Tuning(Case(tp=2, dp=2, ep=2, **E)),
    Tuning(Case(pp=2, dp=2, tied=True, gathering="micro_batch")),
    Tuning(Case(cp=2, way="ring")),
    Tuning(Case(cp=2, dp=2, zero=2, way="heads"), packing=False, micro_batch=2),
]


class Told(NamedTuple):
    """Of one rank's run: its curve, each step's conversations, and what was said of the files."""

    curve: Curve
    members: tuple[Members, ...]
    said: list[str]


def configs(tuning: Tuning, folder: Path) -> tuple[RunConfig, DeepSpeedConfig]:
    data = DataConfig(
        train=[str(folder / "one.jsonl"), str(folder / "two.jsonl")],
        tokenizer=str(folder / "tokenizer"),
        cache_dir=str(folder / "cache"),
        seq_length=SEQ_LENGTH,
        packing=tuning.packing,
    )
    model = model_of(tuning.case.model_kind, tuning.case.tied)
    schedule = ScheduleConfig(num_steps=NUM_STEPS)
    run = run_config(tuning.case, task="finetune", model=model, data=data, schedule=schedule)
    deepspeed, size = deepspeed_config(tuning.case), {"train_micro_batch_size_per_gpu": tuning.micro_batch}
    return run, deepspeed.model_copy(update=size | {"raw": deepspeed.raw | size})


def run_tunings(rank: int, tunings: list[Tuning], folder: Path) -> list[Told]:
    initialize_communication()
    return [run_tuning(rank, tuning, folder) for tuning in tunings]


def run_tuning(rank: int, tuning: Tuning, folder: Path) -> Told:
    run, deepspeed = configs(tuning, folder)
    context = build_context(run, rank, tuning.case.world_size, torch.device("cpu"))
    curve, said = Curve(), list[str]()
    run, data = open_data(run, deepspeed, context, NUM_STEPS * BATCH, Newest(None, {}), said.append)
    trainer = StageTrainer(run, deepspeed, context)
    for step in range(NUM_STEPS):
        result = trainer.train_step(data.train.batch(step * BATCH), learning_rate_of(step))
        curve.losses.append(result.loss)
        curve.norms.append(result.grad_norm)
        if step == 0:
            curve.gradients = first_gradients(trainer, tuning.case)
    return Told(curve, tuple(members_of(data, step) for step in range(NUM_STEPS)), said)


def open_with_one_source_more(rank: int, tuning: Tuning, folder: Path) -> str:
    """Why a run on two sources does not go on from a checkpoint of the first."""
    initialize_communication()
    run, deepspeed = configs(tuning, folder)
    context = build_context(run, rank, tuning.case.world_size, torch.device("cpu"))
    opened = partial(open_data, run, deepspeed, context, NUM_STEPS * BATCH)
    _, data = opened(Newest(None, {}), lambda text: None)
    recorded = {"train": data.description["train"][:1]}
    with pytest.raises(DataError) as refusal:
        opened(Newest(folder, {"data": recorded}), lambda text: None)
    return str(refusal.value)


def test_conversations_do_not_change_during_a_run(folder):
    (tuning,) = [tuning for tuning in TUNINGS if tuning.case.world_size == 1][:1]
    (refusal,) = run_distributed(open_with_one_source_more, 1, tuning, folder)
    assert refusal.startswith(f"this is not the data of {folder}: train: expected 1 datasets, found 2: ")
    assert "begin another one with checkpoint.start_from" in refusal and "\n" not in refusal


def members_of(data: Data, step: int) -> Members:
    assert isinstance(data.train, PreparedBatches) and isinstance(data.train.loader, ChatLoader)
    samples = data.train.loader.dataset
    positions = range(step * BATCH, (step + 1) * BATCH)
    return tuple(tuple(int(item) for item in samples.items(position)) for position in positions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    write_conversations(folder)
    return folder


@cache
def told_of_world(world_size: int, folder: Path) -> dict[Tuning, list[Told]]:
    """What each rank told of every tuning of so many ranks, which are started once."""
    tunings = [tuning for tuning in TUNINGS if tuning.case.world_size == world_size]
    by_rank = run_distributed(run_tunings, world_size, tunings, folder, timeout_seconds=600)
    return {tuning: [told[i] for told in by_rank] for i, tuning in enumerate(tunings)}


def global_loss(theirs: torch.nn.Module, members: Members) -> torch.Tensor:
    """Mean over all learnt tokens of a global batch, conversation by conversation."""
    total, count = torch.zeros(()), 0
    for number in (number for sample in members for number in sample):
        ids, is_learnt = tokens_of(conversations()[number])
        logits = theirs(ids[None]).logits[0]
        learnt = is_learnt[1:]
        total = total + F.cross_entropy(logits[:-1][learnt], ids[1:][learnt], reduction="sum")
        count += int(learnt.sum())
    return total / count


@cache
def expected(model_kind: str, tied: bool, members: tuple[Members, ...]) -> Curve:
    theirs = transformers_model(model_of(model_kind, tied), SEED)
    curve, optimizer = Curve(), WrittenOutAdamW(theirs.parameters())
    for step, global_batch in enumerate(members):
        loss = global_loss(theirs, global_batch)
        loss.backward()
        if step == 0:
            curve.gradients = under_our_names({n: p.grad.clone() for n, p in theirs.named_parameters()})
        norm = sum(p.grad.double().square().sum() for p in theirs.parameters()).sqrt().item()
        optimizer.step(learning_rate_of(step), min(1.0, CLIP / (norm + 1e-6)))
        curve.losses.append(loss.item())
        curve.norms.append(norm)
    return curve


def assert_near(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], scale: float) -> None:
    """Each gradient, as a whole: the norm of the difference over the norm."""
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        relative = ((got[name] - scale * gradient).norm() / (scale * gradient).norm()).item()
        assert relative < 1e-5, f"gradient of {name} is off by {relative:.1e}"


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_every_layout_trains_as_transformers_on_one_conversation_at_a_time(tuning, folder):
    ranks = told_of_world(tuning.case.world_size, folder)[tuning]
    assert len({told.members for told in ranks}) == 1
    want = expected(tuning.case.model_kind, tuning.case.tied, ranks[0].members)
    assert min(want.norms) > CLIP
    for told in ranks:
        assert_same_numbers("loss", told.curve.losses, want.losses)
        assert_same_numbers("norm", told.curve.norms, want.norms)
        assert_near(told.curve.gradients, want.gradients, CLIP / want.norms[0])


def learnt_by_micro_batch(tuning: Tuning, members: Members) -> list[int]:
    """In the order of ranks and of their micro batches, as many samples in each."""
    counts = [sum(int(tokens_of(conversations()[i]).is_learnt[1:].sum()) for i in one) for one in members]
    return [sum(counts[i : i + tuning.micro_batch]) for i in range(0, BATCH, tuning.micro_batch)]


def test_what_is_learnt_lies_unevenly_on_micro_batches_and_ranks(folder):
    """Else a mean of means would be the mean."""
    for tuning in TUNINGS:
        members = told_of_world(tuning.case.world_size, folder)[tuning][0].members
        counts = [learnt_by_micro_batch(tuning, one) for one in members]
        if tuning.micro_batch == 1:
            assert min(map(min, counts)) <= 4 and max(max(one) / min(one) for one in counts) > 5, counts
        per_rank = BATCH // tuning.micro_batch // tuning.case.dp
        of_ranks = [[sum(one[i : i + per_rank]) for i in range(0, len(one), per_rank)] for one in counts]
        assert tuning.case.dp == 1 or max(max(one) / min(one) for one in of_ranks) > 1.2, of_ranks


def test_packed_samples_hold_several_conversations_and_epochs_differ(folder):
    told = told_of_world(1, folder)[TUNINGS[0]][0]
    assert max(len(sample) for members in told.members for sample in members) > 2
    drawn = [number for members in told.members for sample in members for number in sample]
    assert set(drawn) == set(range(len(conversations()))) and len(drawn) > len(set(drawn))
    assert "left out 1 of 17 records: 1 with more than 64 tokens (first:" in told.said[0]
    assert "left out 1 of 25 records: 1 with no assistant turn (first:" in told.said[1]


@pytest.mark.parametrize("wrong", ["mask", "mean"])
def test_control_a_wrong_mask_or_mean_is_noticed(wrong, monkeypatch):
    members = tuple(tuple((i + 8 * step,) for i in range(BATCH)) for step in range(2))
    want = expected("dense", False, members)
    if wrong == "mask":  # one token early: the end of a turn is not learnt, and what precedes an answer is
        real = tokens_of
        early = lambda messages: real(messages)._replace(is_learnt=real(messages).is_learnt.roll(-1))  # noqa: E731
        monkeypatch.setattr("tests.test_finetuning_equivalence.tokens_of", early)
    else:
        whole = global_loss
        monkeypatch.setattr(
            "tests.test_finetuning_equivalence.global_loss",
            lambda theirs, members: sum(whole(theirs, (one,)) for one in members) / len(members),
        )
    other = expected.__wrapped__("dense", False, members)
    with pytest.raises(AssertionError, match="loss of step 0"):
        assert_same_numbers("loss", other.losses, want.losses)
    with pytest.raises(AssertionError, match="gradient of"):
        assert_near(other.gradients, want.gradients, 1.0)
