"""AdamW's update by kernels of others that are there: the same steps as torch's."""

import pytest
import torch

from megalite.config.optimizer import OptimizerConfig
from megalite.kernels import adamw
from megalite.kernels.adamw import ADAMW, ADAMW_PACKAGES, AdamRule, AdamTensors
from megalite.kernels.choice import KernelError, choose_kernels
from megalite.optimizer.stepper import AdamWStepper

CPU = torch.device("cpu")
SETTING = "optimizer.implementation"
SIZES, DECAYS, NUM_STEPS = (7, 70_001), (0.25, 0.0), 5  # neither size is a multiple of a vector's


def stepped(update):
    """Weights and means after some steps with gradients drawn alike."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(size, generator=generator).requires_grad_() for size in SIZES]
    config = OptimizerConfig(learning_rate=0.05, beta1=0.8, beta2=0.93, epsilon=1e-7)
    groups = [{"params": [w], "weight_decay": decay} for w, decay in zip(weights, DECAYS, strict=True)]
    stepper = AdamWStepper(groups, config, update)
    for step in range(NUM_STEPS):
        for group in stepper.param_groups:
            group["lr"] = 0.05 / (1 + step)
        for weight in weights[step % 2 :]:  # the first of them sits out every second step
            weight.grad = torch.randn(weight.shape, generator=generator)
        stepper.step()
        stepper.zero_grad()
    kinds = ("exp_avg", "exp_avg_sq")
    return [w.detach() for w in weights] + [stepper.state[w][kind] for w in weights for kind in kinds]


def test_deepspeeds_kernel_steps_as_torchs_does():
    """In fp32, where a step rounds its few operations in another order: 1e-6 is some ten roundings."""
    if refusal := ADAMW_PACKAGES["deepspeed"].refusal(SETTING, "deepspeed", CPU):
        pytest.skip(refusal)
    torch.testing.assert_close(stepped(ADAMW["deepspeed"]), stepped(ADAMW["torch"]), rtol=1e-6, atol=1e-6)


def test_a_step_depends_on_its_number_alone():
    """Not on the steps before it in the process, which one that resumes has not taken: the bits are equal."""
    if refusal := ADAMW_PACKAGES["deepspeed"].refusal(SETTING, "deepspeed", CPU):
        pytest.skip(refusal)
    update = choose_kernels("auto", "auto", CPU, adamw="deepspeed").adamw
    assert update is ADAMW["deepspeed"] is not None

    def after(steps):
        ones = [
            torch.full((33,), value) for value in (0.5, 0.0, 0.25, 0.125)
        ]  # a weight of 0 rounds nothing off
        for t in steps:
            tensors = AdamTensors(*([tensor.clone()] for tensor in ones))
            update(tensors, AdamRule(0.05, 0.9, 0.999, 1e-7, 0.25, t))
        return tensors

    for one, other in zip(after([2000]), after(range(1, 2001)), strict=True):
        assert torch.equal(one[0], other[0])


def test_a_kernel_that_does_not_compile_is_refused_in_one_line(monkeypatch):
    def fails():
        raise RuntimeError("Error building extension 'fused_adam'\n[1/3] c++ -MMD")

    monkeypatch.setattr(adamw, "_deepspeeds_kernel", fails)
    with pytest.raises(KernelError) as refused:
        choose_kernels("auto", "auto", CPU, adamw="deepspeed")
    assert str(refused.value) == (
        f"{SETTING} deepspeed is compiled at its first use, and that failed (Error building extension "
        f"'fused_adam'): install a C++ compiler, Python's headers and ninja, or set {SETTING}=auto"
    )
    with pytest.raises(KernelError, match="accelerator cpu and this run is on meta"):
        choose_kernels("auto", "auto", torch.device("meta"), adamw="deepspeed")
