"""Attention of a cut sequence is that of the whole one, in every way, with any documents.

In float64 against a softmax written out in one process. Both sides sum the same numbers in another order,
about 1e-16 relative per sum: 1e-11 leaves room for the sums' length and would not hide a wrong term.
"""

import math
from functools import cache

import pytest
import torch

from megalite.batch import Batch
from megalite.kernels.attention import attend_by_sdpa
from megalite.model.llama import LlamaStage
from megalite.model.partial_attention import (
    attend,
    attend_backward,
    attend_by_products,
    attend_by_products_backward,
    merge,
)
from megalite.model.spread_attention import SpreadSpans
from megalite.parallel.context import ParallelContext
from megalite.parallel.plan import LayerPlan
from megalite.parallel.sequence import SequenceCut
from megalite.parallel.topology import Topology
from tests.harness import run_distributed
from tests.model.test_spans import CONFIG

WAYS = ("gather", "ring", "heads")
B, HEADS, SIZE = 2, 12, 4
KV_HEADS = {2: 4, 3: 1, 4: 2}  # by ranks: several for each, and copies of one and of two
CLOSE = {"rtol": 1e-11, "atol": 1e-11}
LENGTHS = {  # of the documents of two samples, which no number of ranks divides
    "none": None,
    "some": [[7, 1, 13, 3], [5, 2, 17]],
    "one token each": [[1] * 24, [24]],
    "a border in each chunk": [[2, 3, 3, 3, 3, 3, 3, 3, 1], [11, 1, 1, 11]],
}
CASES = [(size, way, documents) for size in (2, 3, 4) for way in WAYS for documents in LENGTHS]
LENGTH = 24


def starts_of(documents):
    if LENGTHS[documents] is None:
        return None
    rows = [torch.tensor(lengths) for lengths in LENGTHS[documents]]
    return torch.stack([(row.cumsum(0) - row).repeat_interleave(row) for row in rows])


def drawn(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def whole_tensors(kv_heads):
    """query, key, value, and the gradient of the output."""
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    return [drawn(seed, B, number, LENGTH, SIZE) for seed, number in enumerate(heads)]


def written_out(query, key, value, seen):
    """[b, A, m, D], token by token; 0 for one that sees nothing."""
    copies = query.size(1) // key.size(1)
    rows = []
    for i in range(query.size(2)):
        heads = []
        for head in range(query.size(1)):
            scores = (key[:, head // copies] @ query[:, head, i].unsqueeze(-1)).squeeze(-1) / math.sqrt(SIZE)
            weights = torch.where(seen[:, i], scores.exp(), 0.0)
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
            heads.append((weights.unsqueeze(-1) * value[:, head // copies]).sum(1))
        rows.append(torch.stack(heads, dim=1))
    return torch.stack(rows, dim=2)


@cache
def expected(documents, kv_heads):
    """Output, and gradients of query, key and value."""
    *inputs, grad = whole_tensors(kv_heads)
    inputs = [x.requires_grad_() for x in inputs]
    place, starts = torch.arange(LENGTH), starts_of(documents)
    seen = (place <= place.unsqueeze(1)).expand(B, LENGTH, LENGTH)
    if starts is not None:
        seen = seen & (place >= starts.unsqueeze(-1))
    out = written_out(*inputs, seen)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def attend_here(rank, size):
    context = ParallelContext.build(Topology(size, cp_size=size), rank, torch.device("cpu"))
    cut, found = SequenceCut(LENGTH, context["cp"]), {}
    for case in CASES:
        _, way, documents = case
        if case[0] == size:
            *inputs, grad = (cut.part(x, dim=2) for x in whole_tensors(KV_HEADS[size]))
            inputs = [x.requires_grad_() for x in inputs]
            batch = Batch(document_starts=starts_of(documents))
            spans = SpreadSpans.of_part(batch, cut, way, torch.device("cpu"))
            out = spans.attend(*inputs, attend_by_sdpa)
            found[case] = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    return found


@cache
def found_of(size):
    return run_distributed(attend_here, size, size)


@pytest.mark.parametrize(("size", "way", "documents"), CASES)
def test_attention_of_a_cut_sequence_is_that_of_the_whole(size, way, documents):
    cut = SequenceCut(LENGTH, ParallelContext(Topology(size, cp_size=size))["cp"])
    for place, want in enumerate(expected(documents, KV_HEADS[size])):
        parts = [found[size, way, documents][place] for found in found_of(size)]
        torch.testing.assert_close(cut.in_order(torch.cat(parts, dim=2), dim=2), want, **CLOSE)


def test_what_nothing_sees_is_not_computed():
    """Documents of a chunk each: with 4 ranks each meets 2 of the 8 chunks, its own."""
    context = ParallelContext(Topology(4, cp_size=4), rank=1)
    cut = SequenceCut(LENGTH, context["cp"])
    starts = torch.arange(LENGTH).view(1, -1) // 3 * 3
    spans = SpreadSpans.of_part(Batch(document_starts=starts), cut, "ring", torch.device("cpu"))
    assert [len(list(spans.pairs(source))) for source in range(4)] == [0, 2, 0, 0]
    plain = SpreadSpans.of_part(Batch(), cut, "ring", torch.device("cpu"))
    # Causal: chunks 1 and 6 meet 0; 1 twice and 6; 2 and 5; 3 and 4: 9 pairs of 16, on every rank.
    assert [len(list(plain.pairs(source))) for source in range(4)] == [2, 3, 2, 2]


KERNELS = [(attend, attend_backward), (attend_by_products, attend_by_products_backward)]


@pytest.mark.parametrize(("forward", "backward"), KERNELS, ids=["kernel", "products"])
@pytest.mark.parametrize("first_part", [1, 5, 9])
def test_parts_of_the_keys_merge_to_all_of_them(first_part, forward, backward):
    """Queries that see nothing of the second part among them."""
    *inputs, grad = (x[:, :, :10] for x in whole_tensors(3))
    place = torch.arange(10)
    seen = (place <= place.unsqueeze(1)).expand(B, 10, 10).clone()
    seen[1, :, first_part:] = False  # the second sample sees the first part alone
    inputs = [x.clone().requires_grad_() for x in inputs]
    want = written_out(*inputs, seen)
    wanted = torch.autograd.grad(want, inputs, grad)
    query, key, value = (x.detach() for x in inputs)
    spans = [slice(0, first_part), slice(first_part, 10)]
    views = [(key[:, :, span], value[:, :, span], seen[:, None, :, span]) for span in spans]
    whole = merge(*(forward(query, *view) for view in views))
    torch.testing.assert_close(whole[0], want.detach(), **CLOSE)
    gradients = [backward(grad, query, k, v, whole, mask) for k, v, mask in views]
    torch.testing.assert_close(sum(g[0] for g in gradients), wanted[0], **CLOSE)
    for i in (1, 2):
        torch.testing.assert_close(torch.cat([g[i] for g in gradients], dim=2), wanted[i], **CLOSE)


@pytest.mark.parametrize("forward", [attend, attend_by_products])
def test_a_query_that_sees_nothing_gets_nothing(forward):
    query, key, value, _ = whole_tensors(3)
    seen = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    seen[:, :, 3] = False
    out, lse = forward(query, key, value, seen)
    assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == -torch.inf).all()
    assert lse[:, :, 4].isfinite().all()


def logits_with_and_without(rank, size):
    """Of this rank's tokens, with two samples that differ in one token of their first documents."""
    context = ParallelContext.build(Topology(size, cp_size=size), rank, torch.device("cpu"))
    ids = torch.randint(50, (B, LENGTH), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[:, 1] = (other[:, 1] + 1) % 50
    places, found = SequenceCut(LENGTH, context["cp"]).places, []
    for way in WAYS if size == 2 else WAYS[:2]:
        stage = LlamaStage(CONFIG, LayerPlan(context), seed=1, context_attention=way)
        batches = [Batch(x, document_starts=starts_of("some")).part(places) for x in (ids, other)]
        with torch.no_grad():
            found.append([stage(None, batch).transpose(0, 1) for batch in batches])
    return places, found


@pytest.mark.parametrize("size", [2, 4])
def test_a_token_of_the_first_document_changes_no_bit_of_later_ones(size):
    starts = starts_of("some")
    changed = 0
    for places, found in run_distributed(logits_with_and_without, size, size):
        is_later = starts[:, places] > 0
        for one, other in found:
            assert torch.equal(one[is_later], other[is_later])
            changed += int((one != other).any(-1).sum())
    # Its own place and those after it: 6 of 7 tokens, 4 of 5, in each way.
    assert changed == 10 * len(found)


def bytes_saved(rank, size, length):
    """For backward of a step of two layers, way by way; weights, which are there anyway, not counted."""
    context = ParallelContext.build(Topology(size, cp_size=size), rank, torch.device("cpu"))
    config = CONFIG.model_copy(update={"num_key_value_heads": 4, "max_position_embeddings": 512})
    ids = torch.zeros(1, length, dtype=torch.int64)
    batch, found = Batch(ids, ids).part(SequenceCut(length, context["cp"]).places), []
    for way in WAYS:
        stage = LlamaStage(config, LayerPlan(context), context_attention=way)
        weights = {p.data_ptr() for p in stage.parameters()}
        saved: dict[int, int] = {}

        def keep(x, weights=weights, saved=saved):
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = stage(None, batch)
        found.append(sum(saved.values()))
        del loss
    return found


def test_what_is_kept_for_backward_falls_with_the_ranks():
    """Gathered keys and values among it: they come again in backward. By heads, the output is kept twice: as
    attention gave it and as the next layer takes it.

    5 % are allowed: each layer keeps the angles of its own positions, 1 %, and the order of the whole
    sequence stays, 16 bytes a token. Keys and values of the whole sequence would be 36 % at four ranks.
    """
    length = 512
    output_bytes = 4 * CONFIG.num_hidden_layers * length * CONFIG.hidden_size
    by_size = {size: run_distributed(bytes_saved, size, size, length) for size in (1, 2, 4)}
    for size in (2, 4):
        assert all(rank == by_size[size][0] for rank in by_size[size])
        for way, found in zip(WAYS, by_size[size][0], strict=True):
            whole = by_size[1][0][0] + (output_bytes if way == "heads" else 0)
            assert found == pytest.approx(whole / size, rel=0.05), way
