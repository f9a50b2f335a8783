"""What is not learnt leaves no trace in any gradient, to the bit; a packed batch is its conversations apart.

The batches come from files through our data path; what they must amount to, transformers says with its tokens
and masks. Tolerance, in float64: both sides sum the same numbers in another order, about 1e-16 relative per
sum, and 1e-12 is ten thousand of those.

Rotary positions are relative: a model is the same with positions that do not restart. They are told apart all
the same, since the angles are fp32, whose roundings differ from place to place by 1e-8 and more.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from megalite.batch import IGNORED, Batch
from megalite.config.tuning import PreferenceConfig
from megalite.data.chat import open_chat
from megalite.data.chat_loader import ChatLoader
from megalite.data.packing import SampleOrder
from megalite.model.llama import LlamaStage
from megalite.model.loss import Head, next_token_loss
from megalite.model.preference import PreferenceLoss
from megalite.parallel.context import ParallelContext
from megalite.parallel.plan import LayerPlan
from megalite.parallel.topology import Topology
from megalite.tokenizer.load import load_tokenizer
from megalite.tokenizer.template import open_template
from tests.conversations import (
    SEQ_LENGTH,
    Messages,
    chat_tokenizer,
    conversations,
    model_of,
    tokens_of,
    write_rows,
)
from tests.harness import run_distributed

MODEL = model_of()
NUM_SAMPLES = 4
UNHEARD = "zqxj"  # bytes that come in one last question only, behind all that is learnt
ASKED_LAST = [
    {"role": "user", "content": "Who"},
    {"role": "assistant", "content": "me"},
    {"role": "user", "content": UNHEARD},
]
TALKS: list[Messages] = [ASKED_LAST, *conversations()[:9]]


class Traces(NamedTuple):
    """Of one rank: gradients of its part of what enters the head [b, s/t, h], and of its embedding rows.

    of_embeddings: by token id.
    """

    of_hidden: torch.Tensor
    of_embeddings: dict[int, torch.Tensor]


def loader_of(kind, rows, folder: Path, *, packing: bool, references=None) -> ChatLoader:
    chat_tokenizer().save_pretrained(folder / "tokenizer")
    path, tokenizer = write_rows(folder / "rows.jsonl", rows), load_tokenizer(folder / "tokenizer")
    chat = open_chat(kind, [path], tokenizer, open_template(tokenizer), seq_length=SEQ_LENGTH)
    samples = chat.samples(SampleOrder(SEQ_LENGTH, 1, packing, False), None)
    return ChatLoader(
        samples,
        references=references,
        global_batch_samples=min(NUM_SAMPLES, len(samples)),
        num_micro_batches=1,
        dp_rank=0,
        dp_size=1,
        vocab_size=MODEL.vocab_size,
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Batch, list[Messages]]:
    """One micro batch of several conversations a sample, and which they are."""
    folder = tmp_path_factory.mktemp("packed")
    loader = loader_of("conversations", [{"messages": talk} for talk in TALKS], folder, packing=True)
    positions = loader.positions(0)
    members = [int(item) for position in positions for item in loader.dataset.items(position)]
    assert 0 in members and len(members) > 2 * len(positions) - 2
    return loader.batch(0)[0], [TALKS[number] for number in members]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Batch:
    answers = [[{"role": "assistant", "content": text}] for text in ("Nobody So So", "me")]
    rows = [{"prompt": ASKED_LAST[:1], "chosen": answers[0], "rejected": answers[1]}] * 2
    references = np.array([[-9.0, -4.0], [-8.0, -5.0]])
    folder = tmp_path_factory.mktemp("pairs")
    return loader_of("pairs", rows, folder, packing=False, references=references).batch(0)[0]


def traces(rank: int, batch: Batch, world_size: int) -> Traces:
    context = ParallelContext.build(Topology(world_size, tp_size=world_size), rank, torch.device("cpu"))
    plan, seen = LayerPlan(context, sequence_parallel=world_size > 1), []

    def loss(head: Head, batch: Batch) -> torch.Tensor:
        head.args[0].register_hook(lambda gradient: seen.append(gradient.clone()))
        if batch.references is None:
            return next_token_loss(head, batch)
        return PreferenceLoss(PreferenceConfig())(head, batch)[0]

    stage = LlamaStage(MODEL, plan, seed=3, loss=loss)
    stage(None, batch).backward()
    [of_hidden] = seen
    weight = stage.embed_tokens.weight
    return Traces(of_hidden.transpose(0, 1), dict(enumerate(weight.grad, rank * len(weight))))


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("task", ["conversations", "pairs"])
def test_a_masked_label_gives_what_enters_the_head_a_gradient_of_zero(task, tp_size, packed, pairs):
    batch = packed[0] if task == "conversations" else pairs
    masked = batch.labels == IGNORED
    assert masked.any() and not masked.all()
    told = run_distributed(traces, tp_size, batch, tp_size)
    gradient = torch.cat([trace.of_hidden for trace in told], dim=1)
    assert torch.count_nonzero(gradient[masked]) == 0
    assert gradient[~masked].abs().amax(-1).min() > 0


@pytest.mark.parametrize("tp_size", [1, 2])
def test_tokens_behind_all_that_is_learnt_and_padding_leave_no_trace_in_the_embedding(tp_size, packed):
    batch, _ = packed
    unheard = set(chat_tokenizer().encode(UNHEARD, add_special_tokens=False))
    heard = set(tokens_of(ASKED_LAST[:2]).ids.tolist())
    padding = set(batch.input_ids[batch.padding].tolist())
    assert unheard and padding and unheard <= set(batch.input_ids.flatten().tolist())
    assert heard.isdisjoint(unheard | padding)
    rows = {}
    for told in run_distributed(traces, tp_size, batch, tp_size):
        rows |= told.of_embeddings
    assert {number for number in unheard | padding if torch.count_nonzero(rows[number])} == set()
    assert all(rows[number].abs().max() > 0 for number in heard)


def gradients(stage: LlamaStage) -> dict[str, torch.Tensor]:
    return {p.spec.name: p.grad for p in stage.parameters()}


def together(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss sum and gradients in float64."""
    stage = LlamaStage(MODEL, LayerPlan(dtype=torch.float64), seed=3)
    loss = stage(None, batch)
    loss.backward()
    return loss.detach(), gradients(stage)


def apart(talks: list[Messages]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same, a conversation at a time: no neighbour, no padding, no document."""
    stage = LlamaStage(MODEL, LayerPlan(dtype=torch.float64), seed=3)
    total = torch.zeros((), dtype=torch.float64)
    for ids, is_learnt in map(tokens_of, talks):
        labels = ids[1:].where(is_learnt[1:], IGNORED)
        loss = stage(None, Batch(ids[None, :-1], labels[None]))
        loss.backward()
        total += loss.detach()
    return total, gradients(stage)


def largest_difference(one: tuple, other: tuple) -> float:
    """Relative, of the loss and of each gradient as a whole."""
    pairs = [(one[0], other[0]), *((one[1][name], other[1][name]) for name in other[1])]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def test_a_packed_batch_is_its_conversations_apart(packed):
    batch, talks = packed
    assert largest_difference(together(batch), apart(talks)) < 1e-12


def test_control_without_document_masks_it_is_not(packed):
    batch, talks = packed
    seen = Batch(batch.input_ids, batch.labels, padding=batch.padding)
    assert largest_difference(together(seen), apart(talks)) > 1e-2


def test_control_with_positions_that_do_not_restart_it_is_not(packed):
    batch, talks = packed
    places = torch.arange(SEQ_LENGTH).expand_as(batch.input_ids)
    running = Batch(batch.input_ids, batch.labels, positions=places, document_starts=batch.document_starts)
    assert 1e-9 < largest_difference(together(running), apart(talks)) < 1e-5
