"""The numbers of a tensor are summed up as NumPy does it in float64, whatever the blocks."""

import math

import numpy as np
import pytest
import torch

from megalite.checkpoint.load import TensorReader
from megalite.inspection import blocks
from megalite.inspection.blocks import BlockReader
from megalite.inspection.statistics import statistics_of
from tests.checkpoint.test_load import random_bits
from tests.checkpoint.worlds import cut_all, even_cut, save_world

CASES = {
    "any bits": random_bits((9, 11), 3),
    "plain": torch.randn(8, 13, generator=torch.Generator().manual_seed(0)),
    "large": torch.full((30,), 3e38),  # a sum of float32 overflows, a sum of their squares all the more
    "small": torch.full((30,), 1e-30),
    "one of each": torch.tensor([1.0, -2.0, math.nan, math.inf, -math.inf]),
    "opposite infinities": torch.tensor([math.inf, -math.inf]),
    "scalar": torch.tensor(-3.0),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block_elements", [1, 7, 1000])
def test_statistics_are_those_of_numpy(tmp_path, monkeypatch, name, block_elements):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block_elements)
    full = CASES[name]
    dim = 0 if full.dim() else None
    checkpoint = save_world(tmp_path, 1, cut_all({("weight", "w"): full}, lambda *_: even_cut(dim, 2, 2)))
    found = statistics_of(BlockReader(TensorReader(checkpoint)), ("weight", "w"))
    wide = full.numpy().astype(np.float64).reshape(-1)
    finite = wide[np.isfinite(wide)]
    assert found.num_nonfinite == wide.size - finite.size
    assert found.minimum == (finite.min() if finite.size else None)
    assert found.maximum == (finite.max() if finite.size else None)
    assert found.norm == pytest.approx(np.linalg.norm(finite), rel=1e-13)  # float64, another order of sums
