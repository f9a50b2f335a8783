"""Documents packed into one sample give the losses and gradients of the same documents apart.

In float64: both sides sum the same numbers in another order, so 1e-10 is ample and hides no wrong term.
"""

import pytest
import torch
from megalite.model.documents import Documents
from megalite.model.layout import StageLayout

from megalite.config.model import ModelConfig
from megalite.model.llama import LlamaStage

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
    return LlamaStage(CONFIG, StageLayout(recompute=recompute), seed=1, dtype=torch.float64)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_packed_documents_equal_documents_apart(recompute):
    ids, labels, starts = packed()
    together, apart = stage(recompute), stage()
    loss = together(ids, labels, starts)
    loss.backward()
    total = torch.zeros((), dtype=torch.float64)
    for sample, lengths in enumerate(LENGTHS):
        pieces = zip(ids[sample].split(lengths), labels[sample].split(lengths), strict=True)
        for piece_ids, piece_labels in pieces:
            total = total + apart(piece_ids[None], piece_labels[None]) * len(piece_ids)
    expected = total / ids.numel()
    expected.backward()
    torch.testing.assert_close(loss, expected, **CLOSE)
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, **CLOSE)


def test_without_the_mask_the_loss_is_another():
    ids, labels, starts = packed()
    assert abs(stage()(ids, labels) - stage()(ids, labels, starts)) > 1e-6


def test_one_document_a_sample_is_plain_causal_attention():
    ids, labels, _ = packed()
    one = stage()(ids, labels, torch.zeros_like(ids))
    torch.testing.assert_close(one, stage()(ids, labels), **CLOSE)


def test_positions_restart_at_each_document():
    documents = Documents(torch.stack([starts_of(lengths) for lengths in LENGTHS]))
    expected = [[0, 1, 2, 3, 4, 0, *range(10)], [*range(16)]]
    assert documents.positions.T.tolist() == expected


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_block_attention_equals_the_mask():
    """FlexAttention serves GPUs; what it computes is checked here, uncompiled."""
    documents = Documents(torch.stack([starts_of(lengths) for lengths in LENGTHS]))
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 16, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 16, 8, generator=generator, dtype=torch.float64)
    by_mask = documents.attend(query, key, value)
    torch.testing.assert_close(documents.attend_in_blocks(query, key, value), by_mask)
    crossing = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    assert not torch.allclose(crossing, by_mask)
