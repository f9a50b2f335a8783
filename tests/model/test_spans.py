"""Documents packed into one sample give the losses and gradients of the same documents apart.

In float64: both sides sum the same numbers in another order, so 1e-10 is ample and hides no wrong term.
"""

import pytest
import torch

from megalite.batch import Batch
from megalite.config.model import ModelConfig
from megalite.model.llama import LlamaStage
from megalite.model.spans import AttentionSpans
from megalite.parallel.plan import LayerPlan

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)
LENGTHS = [[5, 1, 10], [16]]  # documents of two samples
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def starts_of(lengths: list[int]) -> torch.Tensor:
    lengths_of_each = torch.tensor(lengths)
    first = lengths_of_each.cumsum(0) - lengths_of_each
    return first.repeat_interleave(lengths_of_each)


def packed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(CONFIG.vocab_size, (2, 17), generator=torch.Generator().manual_seed(3))
    starts = torch.stack([starts_of(lengths) for lengths in LENGTHS])
    return tokens[:, :-1], tokens[:, 1:], starts


def stage(recompute: str = "none") -> LlamaStage:
    return LlamaStage(CONFIG, LayerPlan(dtype=torch.float64), seed=1, recompute=recompute)


def mean_loss(
    stage: LlamaStage, ids: torch.Tensor, labels: torch.Tensor, **parts: torch.Tensor
) -> torch.Tensor:
    batch = Batch(ids, labels, **parts)
    return stage(None, batch) / batch.loss_count()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_packed_documents_equal_documents_apart(recompute):
    ids, labels, starts = packed()
    together, apart = stage(recompute), stage()
    loss = mean_loss(together, ids, labels, document_starts=starts)
    loss.backward()
    total = torch.zeros((), dtype=torch.float64)
    for sample, lengths in enumerate(LENGTHS):
        pieces = zip(ids[sample].split(lengths), labels[sample].split(lengths), strict=True)
        for piece_ids, piece_labels in pieces:
            total = total + apart(None, Batch(piece_ids[None], piece_labels[None]))
    expected = total / ids.numel()
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, **CLOSE)


def test_without_the_mask_the_loss_is_another():
    ids, labels, starts = packed()
    masked = mean_loss(stage(), ids, labels, document_starts=starts)
    assert abs(mean_loss(stage(), ids, labels) - masked) > 1e-6


def test_one_document_per_sample_is_plain_causal_attention():
    ids, labels, _ = packed()
    one = mean_loss(stage(), ids, labels, document_starts=torch.zeros_like(ids))
    torch.testing.assert_close(one, mean_loss(stage(), ids, labels), **CLOSE)


def test_given_positions_turn_the_rotary_angles():
    """All moved alike change nothing, since angles are relative; stretched ones do."""
    ids, labels, _ = packed()
    place = torch.arange(16).expand(2, 16)
    plain = mean_loss(stage(), ids, labels)
    moved = mean_loss(stage(), ids, labels, positions=place + 100)
    torch.testing.assert_close(moved, plain, rtol=1e-5, atol=0)  # the angles are fp32
    assert abs(mean_loss(stage(), ids, labels, positions=2 * place) - plain) > 1e-4


def test_positions_restart_at_each_document():
    spans = AttentionSpans(torch.stack([starts_of(lengths) for lengths in LENGTHS]))
    expected = [[0, 1, 2, 3, 4, 0, *range(10)], [*range(16)]]
    assert spans.positions.T.tolist() == expected
