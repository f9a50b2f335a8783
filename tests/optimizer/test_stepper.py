"""AdamW's steps by a kernel of others are torch's, in weights and in state.

Through a stand-in, which shows how the kernel is called and not what it computes; tests/gpu has the kernel.
"""

import pytest
import torch

from megalite.config.muon import MuonConfig
from megalite.config.optimizer import OptimizerConfig
from megalite.kernels.adamw import update_by_apex
from megalite.optimizer.kinds import ADAM_KINDS
from megalite.optimizer.muon import NUMBER, MuonWithAdamW
from megalite.optimizer.stepper import STEP, AdamWStepper
from tests.foreign_kernels import stand_in_for_apexs_adam

CONFIG = OptimizerConfig(learning_rate=0.05, beta1=0.8, beta2=0.93, epsilon=1e-7, weight_decay=0.25)
CLOSE = {"rtol": 1e-6, "atol": 1e-7}
DECAYS = (0.25, 0.0)


def groups_of(weights, **settings):
    """Two of them that decay, and one that does not."""
    parts = (weights[:2], weights[2:])
    return [{"params": part, "weight_decay": d, **settings} for part, d in zip(parts, DECAYS, strict=True)]


def weights_of(seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((7, 3), (50,), (4,))]


def torchs(weights):
    """The reference: torch's, tensor by tensor."""
    betas = (CONFIG.beta1, CONFIG.beta2)
    options = {"lr": CONFIG.learning_rate, "betas": betas, "eps": CONFIG.epsilon, "foreach": False}
    return torch.optim.AdamW(groups_of(weights), **options)


def give_gradients(step, *many):
    """The same to each list of weights; in the second step the first weight has none."""
    torch.manual_seed(step)
    for gradient, weights in zip(
        [torch.randn_like(w) for w in many[0]], zip(*many, strict=True), strict=True
    ):
        for weight in weights:
            weight.grad = gradient.clone()
    for weights in many:
        weights[0].grad = None if step == 2 else weights[0].grad


def assert_alike(ours, theirs, our_weights, their_weights):
    for weight, reference in zip(our_weights, their_weights, strict=True):
        torch.testing.assert_close(weight, reference, **CLOSE)
        state, expected = ours.state[weight], theirs.state[reference]
        assert state.keys() == expected.keys() == {STEP, *ADAM_KINDS}
        for name in state:
            torch.testing.assert_close(state[name], expected[name], **CLOSE)


def test_a_step_by_apex_is_torchs_with_decay_apart_from_the_gradient(monkeypatch):
    calls = stand_in_for_apexs_adam(monkeypatch)
    ours, theirs = weights_of(), weights_of()
    stepper, reference = AdamWStepper(groups_of(ours), CONFIG, update_by_apex), torchs(theirs)
    for step in range(1, 5):
        give_gradients(step, ours, theirs)
        for optimizer in (stepper, reference):
            optimizer.param_groups[0]["lr"] = 0.02 * step
            optimizer.step()
        assert_alike(stepper, reference, ours, theirs)
    numbers = (CONFIG.beta1, CONFIG.beta2, CONFIG.epsilon)
    assert calls[:2] == [(2, *numbers, 1, 1, 1, 0.25), (1, *numbers, 1, 1, 1, 0.0)]
    # Since the second step the first weight is one behind: it has a call of its own.
    assert [(call[0], call[4]) for call in calls[4:7]] == [(1, 2), (1, 3), (1, 3)]


def test_tensors_that_zero_hands_over_one_after_the_other_count_their_own_steps(monkeypatch):
    """As at ZeRO-1 to 3: a step is a call for each group, or for each tensor of one."""
    stand_in_for_apexs_adam(monkeypatch)
    ours, theirs = weights_of(), weights_of()
    stepper, reference = AdamWStepper(groups_of(ours), CONFIG, update_by_apex), torchs(theirs)
    groups = stepper.param_groups
    for step in (1, 3, 4):
        give_gradients(step, ours, theirs)
        reference.step()
        for number, members in ((0, ours[:1]), (0, ours[1:2]), (1, ours[2:])):
            stepper.param_groups = [groups[number] | {"params": members}]
            stepper.step()
    assert_alike(stepper, reference, ours, theirs)


@pytest.mark.parametrize("takes_over", ["apex", "torch"])
def test_state_of_one_goes_on_in_the_other(takes_over, monkeypatch):
    """As checkpoints carry it: the moments, and the count of steps by itself."""
    stand_in_for_apexs_adam(monkeypatch)
    ours, theirs = weights_of(), weights_of()
    updates = {"apex": update_by_apex, "torch": None}
    first = AdamWStepper(groups_of(ours), CONFIG, updates["torch" if takes_over == "apex" else "apex"])
    second = AdamWStepper(groups_of(ours), CONFIG, updates[takes_over])
    reference = torchs(theirs)
    give_gradients(1, ours, theirs)
    first.step(), reference.step()
    for weight in ours:
        state = second.adam_state(weight)
        for kind in ADAM_KINDS:
            state[kind].copy_(first.state[weight][kind])
        state[STEP].fill_(int(first.state[weight][STEP]))
    give_gradients(3, ours, theirs)
    second.step(), reference.step()
    assert_alike(second, reference, ours, theirs)


def test_what_muon_leaves_to_adamw_is_stepped_by_the_same_kernel(monkeypatch):
    calls = stand_in_for_apexs_adam(monkeypatch)
    ours, theirs = weights_of(), weights_of()
    config = CONFIG.model_copy(update={"name": "muon", "muon": MuonConfig()})
    stepper = MuonWithAdamW(groups_of(ours, **{NUMBER: None}), {}, config, update_by_apex)
    reference = torchs(theirs)
    give_gradients(1, ours, theirs)
    stepper.step(), reference.step()
    assert_alike(stepper, reference, ours, theirs)
    assert len(calls) == 2
