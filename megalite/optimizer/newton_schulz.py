"""Matrices to nearby ones whose singular values are about 1, by matrix products alone."""

from collections.abc import Sequence
from math import sqrt

import torch

from megalite.config.muon import COEFFICIENTS, MuonConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# set -> (factor of the norm, what is added to it): Polar Express needs a margin below 1
_NORM = {"classic": (1.0, 1e-7), "quintic": (1.0, 1e-7), "polar_express": (1.01, 1e-6)}


def orthogonalize(matrices: torch.Tensor, config: MuonConfig) -> torch.Tensor:
    """[n, out, in] -> the same shape in fp32: each U S V^T of the stack to about U V^T (Jordan 2024).

        X = M / ||M||_F      X <- a X + (b A + c A A) X with A = X X^T, per iteration

    on the transposed matrix where that is wider than high, so that A is the smaller product.
    """
    is_high = matrices.size(1) > matrices.size(2)
    x = matrices.transpose(1, 2) if is_high else matrices
    factor, margin = _NORM[config.coefficients]
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = (x / (factor * norm + margin)).to(DTYPES[config.iteration_dtype])
    for a, b, c in _triples(config):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.transpose(1, 2) if is_high else x).float()


def _triples(config: MuonConfig) -> list[tuple[float, float, float]]:
    known = COEFFICIENTS[config.coefficients]
    return [known[min(i, len(known) - 1)] for i in range(config.num_iterations)]


def scale_of(shape: Sequence[int], config: MuonConfig) -> float:
    """What the orthogonal update of [..., out, in] is multiplied with, beside the learning rate."""
    out, into = shape[-2:]
    scales = {
        "match_rms": 0.2 * sqrt(max(out, into)),  # Liu 2025, arXiv 2502.16982, section 2.2
        "original": sqrt(max(1.0, out / into)),
        "unit_rms": sqrt(out / into),
    }
    return scales[config.scale]
