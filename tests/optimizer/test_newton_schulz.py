"""Newton-Schulz: the sign of singular values by matrix products, stacks and shapes, and torch's own Muon."""

import numpy as np
import pytest
import torch

from megalite.config.muon import COEFFICIENTS, MuonConfig
from megalite.optimizer.newton_schulz import orthogonalize, scale_of

SHAPES = [(24, 24), (16, 40), (40, 16)]


def matrix(shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def polynomial(value, name, num_iterations):
    """What the iterations make of one singular value, in float64, by the scalar recursion."""
    known = COEFFICIENTS[name]
    for i in range(num_iterations):
        a, b, c = known[min(i, len(known) - 1)]
        value = a * value + b * value**3 + c * value**5
    return value


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_singular_vectors_are_kept_and_values_go_through_the_polynomial(name, shape):
    """Against an SVD in float64. fp32 rounds to 6e-8, which the iterations enlarge some hundred times."""
    given = matrix(shape)
    u, values, vt = np.linalg.svd(given.double().numpy(), full_matrices=False)
    factor, margin = (1.01, 1e-6) if name == "polar_express" else (1.0, 1e-7)
    starts = values / (factor * np.sqrt((values**2).sum()) + margin)
    expected = u @ np.diag(polynomial(starts, name, 5)) @ vt
    got = orthogonalize(given.unsqueeze(0), MuonConfig(coefficients=name))[0]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-4)
    far = {"classic": 0.35, "quintic": 0.35, "polar_express": 0.15}[name]  # from 1, of well-conditioned ones
    inner = np.linalg.svd(got.double().numpy(), compute_uv=False)[: min(shape) // 2]
    assert np.abs(inner - 1).max() < far


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_matrix_of_a_stack_is_by_itself(shape):
    stack = torch.stack([matrix(shape, seed) * 10.0**seed for seed in range(3)])
    config = MuonConfig(num_iterations=4)
    together = orthogonalize(stack, config)
    for one, its in zip(stack, together, strict=True):
        torch.testing.assert_close(its, orthogonalize(one.unsqueeze(0), config)[0], rtol=1e-4, atol=1e-5)


def test_nothing_becomes_nothing():
    assert orthogonalize(torch.zeros(2, 3, 4), MuonConfig()).equal(torch.zeros(2, 3, 4))


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("scale", "theirs"), [("match_rms", "match_rms_adamw"), ("original", "original")])
def test_steps_are_those_of_torch_with_iterations_in_bf16(scale, theirs, nesterov):
    """torch's Muon rounds to bf16 before it takes the norm, ours after: a rounding is 4e-3, and 5 iterations
    enlarge it; 5 % of the update's largest element are allowed. Without momentum it is off by half of it."""
    config = MuonConfig(scale=scale, nesterov=nesterov, iteration_dtype="bf16")
    weight = torch.nn.Parameter(matrix((24, 40)))
    rate, decay = 0.1, 0.3
    optimizer = torch.optim.Muon(
        [weight], lr=rate, weight_decay=decay, momentum=0.95, nesterov=nesterov, adjust_lr_fn=theirs
    )
    momentum = torch.zeros(24, 40)
    for step in range(3):
        weight.grad = matrix((24, 40), seed=step + 1)
        before = weight.detach().clone()
        optimizer.step()
        momentum.lerp_(weight.grad, 0.05)
        update = weight.grad.lerp(momentum, 0.95) if nesterov else momentum
        ours = orthogonalize(update.unsqueeze(0), config)[0] * scale_of((24, 40), config)
        got = (before * (1 - rate * decay) - weight.detach()) / rate
        assert (got - ours).abs().max() < 0.05 * ours.abs().max()


def test_scales_are_those_of_the_papers():
    scales = {
        name: [scale_of(shape, MuonConfig(scale=name)) for shape in ((16, 64), (64, 16))]
        for name in ("match_rms", "original", "unit_rms")
    }
    assert scales == {"match_rms": [1.6, 1.6], "original": [1.0, 2.0], "unit_rms": [0.5, 2.0]}
