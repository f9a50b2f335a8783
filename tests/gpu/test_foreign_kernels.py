"""Kernels of other packages on a GPU beside the formula; skipped without a GPU, each without its package.

Errors against float64 are bounded by what the format rounds away: a few of its last places, relative to the
largest number of a tensor, and for sums over rows as many more as rounding grows there.
"""

import pytest
import torch
import torch.nn.functional as F

from megalite.config.optimizer import OptimizerConfig
from megalite.kernels.choice import KernelError, choose_kernels
from megalite.optimizer.stepper import AdamWStepper

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

GPU = torch.device("cuda")
PLACES = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}
ROWS, WIDTH = 300, 1000  # neither is a power of two


def chosen(**names):
    """Kernels by name, or a skip that says what is missing."""
    try:
        return choose_kernels("sdpa", names.pop("norm", "torch"), GPU, **names)
    except KernelError as error:
        pytest.skip(str(error))


def drawn(*shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(GPU, dtype).requires_grad_()


def assert_near(function, formula, inputs, dtype):
    """Output and gradients of a function, beside the formula's in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = function(*inputs), formula(*exact)
    grad = drawn(*out.shape, dtype=dtype, seed=9).detach()
    results = [out, *torch.autograd.grad(out, inputs, grad)]
    references = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for result, reference in zip(results, references, strict=True):
        error = (result.double() - reference).abs().max() / reference.abs().max()
        assert result.dtype == dtype and error < 8 * PLACES[dtype]


@pytest.mark.parametrize("dtype", PLACES, ids=str)
@pytest.mark.parametrize("name", ["apex", "liger"])
def test_norm_is_the_formulas(name, dtype):
    norm = chosen(norm=name).norm
    x, weight = drawn(ROWS, 2, WIDTH, dtype=dtype, seed=1), drawn(WIDTH, dtype=dtype, seed=2)
    assert_near(
        lambda x, weight: norm(x, weight, 1e-2),
        lambda x, weight: x * (x.square().mean(-1, keepdim=True) + 1e-2).rsqrt() * weight,
        [x, weight],
        dtype,
    )


@pytest.mark.parametrize("dtype", PLACES, ids=str)
@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves of one tensor"])
def test_gating_by_liger_is_the_formulas(halves, dtype):
    gating = chosen(gating="liger").gating
    gate, up = (drawn(ROWS, WIDTH, dtype=dtype, seed=seed) for seed in (1, 2))

    def gated(gate, up):
        # Liger writes over what it is given, so each time it is given a copy.
        pair = torch.cat([gate, up], -1).chunk(2, -1) if halves else (gate.clone(), up.clone())
        return gating(*pair)

    assert_near(gated, lambda gate, up: F.silu(gate) * up, [gate, up], dtype)


def test_adamw_by_apex_steps_as_torchs_does():
    update = chosen(adamw="apex").adamw
    config = OptimizerConfig(learning_rate=0.05, weight_decay=0.25)
    pairs = []
    for way in (update, None):
        weights = [drawn(n, dtype=torch.float32, seed=n) for n in (7, 200_000)]
        groups = [
            {"params": [weight], "weight_decay": d} for weight, d in zip(weights, (0.25, 0.0), strict=True)
        ]
        stepper = AdamWStepper(groups, config, way)
        for step in range(5):
            for weight in weights:
                weight.grad = drawn(weight.numel(), dtype=torch.float32, seed=step).detach()
            stepper.step()
        pairs.append([weights, *([stepper.state[w][k] for w in weights] for k in ("exp_avg", "exp_avg_sq"))])
    torch.testing.assert_close(*pairs, rtol=1e-6, atol=1e-6)
