"""Steps without torch's compiler are torch's own."""

import pytest
import torch

from megalite.optimizer.eager_adamw import EagerAdamW

OPTIONS = {"lr": 0.05, "betas": (0.8, 0.93), "eps": 1e-7, "fused": True}


def groups_of(seed):
    torch.manual_seed(seed)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((7, 3), (50,), (4,))]
    return weights, [
        {"params": weights[:2], "weight_decay": 0.25},
        {"params": weights[2:], "weight_decay": 0.0},
    ]


def test_steps_groups_and_state_are_torchs_bit_for_bit():
    (ours, our_groups), (theirs, their_groups) = groups_of(0), groups_of(0)
    eager, reference = EagerAdamW(our_groups, **OPTIONS), torch.optim.AdamW(their_groups, **OPTIONS)
    for step in range(1, 4):
        for weight, other in zip(ours, theirs, strict=True):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.clone()
        ours[0].grad = theirs[0].grad = None if step == 2 else ours[0].grad
        for optimizer in (eager, reference):
            optimizer.param_groups[0]["lr"] = 0.02 * step
            optimizer.step()
    assert not torch.equal(ours[0], groups_of(0)[0][0])
    for weight, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=0)
    torch.testing.assert_close(eager.state_dict(), reference.state_dict(), rtol=0, atol=0)
    assert torch.is_grad_enabled() and all(weight.requires_grad and weight.is_leaf for weight in ours)
    eager.zero_grad()
    assert [weight.grad for weight in ours] == [None] * 3


def test_a_parameter_in_two_groups_is_refused_as_by_torch():
    weights, groups = groups_of(0)
    with pytest.raises(ValueError, match="more than one parameter group"):
        EagerAdamW([*groups, {"params": weights[:1]}], **OPTIONS)
