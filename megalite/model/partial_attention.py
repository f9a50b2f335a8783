"""Attention to a part of the keys, and how such parts become attention to all of them.

Shapes: b micro batch, A query heads, K key/value heads, m queries, n keys, D head size.

A part gives the output over its own keys and the logarithm of the sum of their exponentials (lse). Two parts
of the keys of the same queries merge exactly (Milakov 2018, arXiv 1805.02867; Dao 2022, arXiv 2205.14135):

    lse = log(exp lse_1 + exp lse_2)        out = out_1 exp(lse_1 - lse) + out_2 exp(lse_2 - lse)

and with the merged out and lse the backward of each part needs no other part.
"""

import torch

Seen = torch.Tensor | None  # bool [b or 1, 1, m, n], true where a query sees a key; None where each sees all
Part = tuple[torch.Tensor, torch.Tensor]  # out and lse


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: Seen) -> Part:
    """query [b, A, m, D], key and value [b, K, n, D] -> out [b, A, m, D] and lse [b, A, m], at least fp32.

    A query that sees none of the keys gets 0, and -inf.
    """
    if not query.is_cpu:
        return attend_by_products(query, key, value, seen)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    key, value = (_for_queries(x, query) for x in (key, value))
    out, lse = flash(query, key, value, attn_mask=_bias(seen, query))
    # The kernel says 0 of a query that sees nothing.
    return out, lse if seen is None else lse.masked_fill(~seen.any(-1), -torch.inf)


def attend_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, whole: Part, seen: Seen
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a part of the keys adds to the gradients of query, key and value.

    grad: of the output [b, A, m, D]. whole: the attention to all keys together, of which no query sees none.
    """
    if not query.is_cpu:
        return attend_by_products_backward(grad, query, key, value, whole, seen)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    keys, values = (_for_queries(x, query) for x in (key, value))
    bias = _bias(seen, query)
    of_query, of_keys, of_values = flash(grad, query, keys, values, *whole, 0.0, False, attn_mask=bias)
    return of_query, _of_heads(of_keys, key), _of_heads(of_values, value)


def attend_by_products(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: Seen) -> Part:
    """`attend` by two matrix products, on any device."""
    key, value = (_for_queries(x, query) for x in (key, value))
    scores = _scores(query, key, seen)
    lse = scores.logsumexp(-1)
    return (_probabilities(scores, lse) @ value.to(scores)).to(query), lse


def attend_by_products_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, whole: Part, seen: Seen
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`attend_backward` by five."""
    out, lse = whole
    keys, values = (_for_queries(x, query) for x in (key, value))
    scores = _scores(query, keys, seen)
    precise, probabilities = grad.to(scores), _probabilities(scores, lse)
    of_values = probabilities.transpose(-1, -2) @ precise
    of_scores = precise @ values.to(scores).transpose(-1, -2) - (precise * out).sum(-1, keepdim=True)
    of_scores *= probabilities * query.size(-1) ** -0.5
    of_query, of_keys = of_scores @ keys.to(scores), of_scores.transpose(-1, -2) @ query.to(scores)
    return of_query, _of_heads(of_keys, key), _of_heads(of_values, value)


def merge(one: Part, other: Part) -> Part:
    """Both as one, at least fp32; no query sees nothing of the first."""
    lse = torch.logaddexp(one[1], other[1])
    first, second = (out * (own_lse - lse).exp().unsqueeze(-1) for out, own_lse in (one, other))
    return first + second, lse


def _bias(seen: Seen, query: torch.Tensor) -> torch.Tensor | None:
    """What is added to the scores: 0 or -inf."""
    if seen is None:
        return None
    return torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(~seen, -torch.inf)


def _scores(query: torch.Tensor, key: torch.Tensor, seen: Seen) -> torch.Tensor:
    """[b, A, m, n], at least fp32; -inf where a query does not see a key."""
    precise = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(precise) @ key.to(precise).transpose(-1, -2) * query.size(-1) ** -0.5
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf)


def _probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """0 throughout for a query that sees nothing, whose scores and lse are -inf."""
    return (scores - lse.masked_fill(lse.isneginf(), 0.0).unsqueeze(-1)).exp()


def _for_queries(heads: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Key or value heads, one for each query head."""
    copies = query.size(1) // heads.size(1)
    return heads if copies == 1 else heads.repeat_interleave(copies, dim=1)


def _of_heads(gradient: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """The inverse for gradients: those of the copies of each head summed."""
    return gradient.unflatten(1, (heads.size(1), -1)).sum(2)
