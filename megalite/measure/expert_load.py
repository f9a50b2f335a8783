"""How busy each expert was over a run, from the rows of its metrics."""

from itertools import pairwise
from typing import Any

import numpy as np

from megalite.error import UserError

MOST_COLUMNS = 200  # of a map of experts: more would be finer than its dots


class ExpertLoadError(UserError):
    """Rows that do not tell of the same experts."""


def expert_loads(
    rows: list[dict[str, Any]], most_columns: int = MOST_COLUMNS
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The edges of columns in optimizer steps [C + 1], and the load of each layer's experts in these [E, C].

    A load is an expert's tokens over the mean of its layer's experts: 1 is balance. Neighbouring rows share a
    column where there are more of them than `most_columns`.
    """
    columns = np.array_split(np.arange(len(rows)), min(len(rows), most_columns))
    steps = [row["step"] for row in rows]
    borders = [(steps[left[-1]] + steps[right[0]]) / 2 for left, right in pairwise(columns)]
    loads = {}
    for layer, tokens in _tokens_by_layer(rows).items():
        sums = np.stack([tokens[column].sum(0) for column in columns], axis=1)
        loads[layer] = sums * len(sums) / np.maximum(sums.sum(0), 1)
    return np.array([steps[0] - 0.5, *borders, steps[-1] + 0.5]), loads


def _tokens_by_layer(rows: list[dict[str, Any]]) -> dict[int, np.ndarray]:
    """layer -> the tokens of its experts in each row, int64 [rows, E]."""
    found = [_tokens_of(row) for row in rows]
    first = {layer: tokens.size for layer, tokens in found[0].items()}
    for row, tokens in zip(rows, found, strict=True):
        sizes = {layer: array.size for layer, array in tokens.items()}
        for layer in sorted(sizes | first):
            if sizes.get(layer) != first.get(layer):
                raise ExpertLoadError(
                    f"step {row['step']}: {sizes.get(layer, 0)} experts of layer {layer} in expert_tokens, "
                    f"{first.get(layer, 0)} in step {rows[0]['step']}"
                )
    return {layer: np.stack([tokens[layer] for tokens in found]) for layer in sorted(first)}


def _tokens_of(row: dict[str, Any]) -> dict[int, np.ndarray]:
    """layer -> the tokens of its experts in one row, int64 [E]."""
    try:
        tokens = {int(layer): np.array(counts) for layer, counts in row["expert_tokens"].items()}
        if tokens and all(array.ndim == 1 and array.dtype.kind == "i" for array in tokens.values()):
            return tokens
    except (AttributeError, ValueError):
        pass
    raise ExpertLoadError(
        f"step {row['step']}: expert_tokens is not whole numbers for each expert of each layer"
    )
