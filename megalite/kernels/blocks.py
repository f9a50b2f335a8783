"""Attention in blocks of rows: few batched products, and no work on keys that nobody sees.

Shapes: b micro batch, s_q queries, s_k keys, A query heads, K key/value heads, g = A/K query heads of each,
D head size, n = b K. The query heads of a group are rows of one product: queries are [n, s_q g, D], keys and
values [n, s_k, D]. For a block of rows, with the keys that they see:

    P = softmax(Q K.T)      O = P V
    dV += P.T dO            dS = P * (dO V.T - rowsum(P * (dO V.T)))       dQ = dS K      dK += dS.T Q

where Q has the factor 1 / sqrt(D). A row of scores is whole, unlike in FlashAttention (Dao 2022, arXiv
2205.14135), so its softmax is one operation. Where log-sum-exps have gradients dL, dS += P * dL.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megalite.kernels.limits import BLOCK_BYTES, KEPT_TOKENS
from megalite.kernels.sight import Block, Sight, causal

SCORES_BYTES = 4 << 20  # of one product: what stays in a core's cache, about


def attend_in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sight: Sight | None = None,
    *,
    kept_tokens: int = KEPT_TOKENS,
) -> torch.Tensor:
    """query [b, A, s_q, D], key and value [b, K, s_k, D] -> [b, A, s_q, D], in memory [s_q, b, A, D].

    sight: which keys a query sees; None means all up to its own place.
    kept_tokens: up to so many keys backward finds the probabilities, at most b A s_q s_k numbers; beyond, it
        computes them again.
    """
    return _attention(query, key, value, sight, kept_tokens, with_lse=False)[0]


def attend_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sight: Sight | None = None,
    *,
    kept_tokens: int = KEPT_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, and each query's log of the sum of exp(scores), [b, A, s_q], in fp32 or float64.

    Attention to several sets of keys can be put together of these: gradients flow through both. A query that
    sees no key has output 0 and log-sum-exp -inf.
    """
    return _attention(query, key, value, sight, kept_tokens, with_lse=True)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sight: Sight | None,
    kept_tokens: int,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if sight is None:
        assert query.size(2) == key.size(2), "queries and keys of different places need a sight"
        sight = causal(query.size(2), query.device)
    keeps = key.size(2) <= kept_tokens and torch.is_grad_enabled()
    return _BlockAttention.apply(query, key, value, sight, keeps, with_lse)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sight: Sight,
        keeps: bool,
        with_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.sight, ctx.shape, ctx.num_kv_heads = sight, query.shape, key.size(1)
        q = _to_rows(query, key.size(1)).mul_(query.size(-1) ** -0.5)
        k, v = (x.flatten(0, 1).contiguous() for x in (key, value))
        out, kept = torch.empty_like(q), []
        lse = q.new_empty(q.shape[:2], dtype=_wide(q.dtype)) if with_lse else None
        scratch = None if keeps else _Scratch(q)
        for block, n, rows in _pieces(sight, key.size(1), q):
            if not block.num_keys:
                out[n, rows] = 0
                if lse is not None:
                    lse[n, rows] = -torch.inf
                continue
            scores = _scores(block, q[n, rows], k[n, block.keys], scratch)
            if lse is not None:
                lse[n, rows] = torch.logsumexp(scores.to(lse.dtype), -1)
            p = _probabilities(block, scores)
            torch.bmm(p, v[n, block.keys], out=out[n, rows])
            if keeps:
                kept.append(p)
        ctx.save_for_backward(q, k, v, lse, *kept)
        lse_of_heads = None if lse is None else _from_rows(lse.unsqueeze(-1), query.shape).squeeze(-1)
        return _from_rows(out, query.shape), lse_of_heads

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor | None, grad_lse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, lse, *kept = ctx.saved_tensors
        batch, head_dim = ctx.shape[0], ctx.shape[-1]
        go = torch.zeros_like(q) if grad is None else _to_rows(grad, ctx.num_kv_heads)
        g_lse = None
        if grad_lse is not None:  # of a query that sees nothing it is no number, and means nothing
            g_lse = _to_rows(grad_lse.unsqueeze(-1), ctx.num_kv_heads)
            g_lse = torch.where(lse.unsqueeze(-1).isfinite(), g_lse, 0).to(q.dtype)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=_wide(x.dtype)) for x in (k, v))
        scratch, again, remembered = _Scratch(q), _Scratch(q), iter(kept)
        for block, n, rows in _pieces(ctx.sight, ctx.num_kv_heads, q):
            if not block.num_keys:
                dq[n, rows] = 0
                continue
            rows_q, rows_go, keys, values = q[n, rows], go[n, rows], k[n, block.keys], v[n, block.keys]
            p = next(remembered, None)
            if p is None:
                p = _probabilities(block, _scores(block, rows_q, keys, again))
            _add_product(dv[n, block.keys], p.mT, rows_go)
            ds = torch.bmm(rows_go, values.mT, out=scratch.like(p))
            torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
            if g_lse is not None:
                ds.addcmul_(p, g_lse[n, rows])
            torch.bmm(ds, keys, out=dq[n, rows])
            _add_product(dk[n, block.keys], ds.mT, rows_q)
        dq.mul_(head_dim**-0.5)
        kv_shape = (batch, ctx.num_kv_heads, *k.shape[1:])
        dk, dv = (x.to(k.dtype).view(kv_shape) for x in (dk, dv))
        return _from_rows(dq, ctx.shape), dk, dv, None, None, None


class _Scratch:
    """Memory for the scores of one block, which the next one takes over: pages once touched stay."""

    def __init__(self, like: torch.Tensor) -> None:
        self._memory = like.new_empty(0)

    def take(self, *shape: int) -> torch.Tensor:
        """A tensor of any values."""
        size = torch.Size(shape).numel()
        if self._memory.numel() < size:
            self._memory = self._memory.new_empty(size)
        return self._memory[:size].view(shape)

    def like(self, other: torch.Tensor) -> torch.Tensor:
        """One of another's shape."""
        return self.take(*other.shape)


def _pieces(sight: Sight, num_kv_heads: int, q: torch.Tensor) -> Iterator[tuple[Block, slice, slice]]:
    """Each block with the part of n and the rows of q [n, s_q g, D] of one product."""
    group = q.size(1) // len(sight.query_places)
    num_rows = max(1, BLOCK_BYTES // q.element_size())
    for block in sight.blocks(num_rows):
        first, stop, _ = block.samples.indices(q.size(0) // num_kv_heads)
        first, stop = first * num_kv_heads, stop * num_kv_heads
        of_one = max(1, block.num_rows * group * block.num_keys) * q.element_size()
        step = max(1, SCORES_BYTES // of_one)
        for n in range(first, stop, step):
            rows = slice(block.rows.start * group, block.rows.stop * group)
            yield block, slice(n, min(n + step, stop)), rows


def _scores(block: Block, q: torch.Tensor, k: torch.Tensor, scratch: _Scratch | None) -> torch.Tensor:
    """Q K.T [n, rows g, keys], -inf where a row does not see a key."""
    shape = (q.size(0), q.size(1), k.size(1))
    scores = torch.bmm(q, k.mT, out=scratch.take(*shape) if scratch else q.new_empty(shape))
    by_row = scores.view(q.size(0), block.num_rows, -1, k.size(1))
    for hidden in block.hidden:
        by_row[..., hidden.columns].masked_fill_(hidden.by, -torch.inf)
    return scores


def _probabilities(block: Block, scores: torch.Tensor) -> torch.Tensor:
    """softmax of scores, in their place; 0 for rows that see nothing."""
    p = torch.softmax(scores, -1, out=scores)
    if block.blind is not None:
        p.view(p.size(0), block.num_rows, -1, p.size(2)).masked_fill_(block.blind, 0)
    return p


def _add_product(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """total += x y, in the total's format: a sum over blocks in bf16 would lose their last bits."""
    if total.dtype == x.dtype:
        total.baddbmm_(x, y)
    else:
        total.add_(torch.bmm(x, y))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The format of sums and statistics: fp32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _to_rows(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[b, A, s, D] -> a new [b K, s g, D]."""
    grouped = x.unflatten(1, (num_kv_heads, -1)).transpose(2, 3)  # [b, K, s, g, D]
    rows = torch.empty(grouped.shape, dtype=x.dtype, device=x.device).copy_(grouped)
    return rows.view(grouped.size(0) * num_kv_heads, -1, x.size(-1))


def _from_rows(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[b K, s g, D] -> [b, A, s, D] of the shape's b, A and s, in memory [s, b, A, D]."""
    batch, heads, length, _ = shape
    num_kv_heads = rows.size(0) // batch
    grouped = rows.view(batch, num_kv_heads, length, heads // num_kv_heads, rows.size(-1))
    return grouped.permute(2, 0, 1, 3, 4).flatten(2, 3).permute(1, 2, 0, 3)
