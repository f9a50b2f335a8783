"""The recipe of AdamW: which parameters go where, and at which rate and decay each is stepped."""

import pytest
import torch

from megalite.config.optimizer import OptimizerConfig
from megalite.model.llama import LlamaStage
from megalite.model.share import StageShare
from megalite.optimizer.adamw import AdamW
from megalite.optimizer.recipe import RATE_FACTOR, ParameterGroup, set_learning_rate, state_bytes
from megalite.parallel.shard import ShardSpec, spec_of
from tests.trainers import MODEL, TIED

CONFIG = OptimizerConfig(learning_rate=0.5, beta1=0.8, beta2=0.93, epsilon=1e-7, weight_decay=0.25)


def names(group):
    return {spec_of(parameter).name for parameter in group.parameters}


def test_matrices_decay_and_vectors_do_not():
    stage = LlamaStage(MODEL)
    groups = AdamW(CONFIG).groups(list(stage.parameters()))
    assert [group.settings["weight_decay"] for group in groups] == [0.25, 0.25, 0.0]
    assert sum(len(group.parameters) for group in groups) == len(list(stage.parameters()))
    assert all(name.endswith("norm.weight") for name in names(groups[2])) and len(names(groups[2])) == 9
    assert [len(group.parameters) for group in groups] == [1, 29, 9]


def test_a_tied_table_is_alone_on_both_stages_that_hold_it():
    first = LlamaStage(TIED, share=StageShare(range(2), has_head=False))
    last = LlamaStage(TIED, share=StageShare(range(2, 4), has_embedding=False))
    for stage in (first, last):
        alone, *_ = AdamW(CONFIG).groups(list(stage.parameters()))
        assert names(alone) == {"model.embed_tokens.weight"}


def test_what_is_not_trained_is_in_no_group():
    stage = LlamaStage(MODEL)
    for parameter in stage.parameters():
        parameter.requires_grad_(len(spec_of(parameter).full_shape) > 1)
    groups = AdamW(CONFIG).groups(list(stage.parameters()))
    assert [len(group.parameters) for group in groups] == [1, 29]


def test_the_rate_of_a_step_reaches_each_group_times_its_factor():
    groups = [{RATE_FACTOR: 1.0, "lr": 7.0}, {RATE_FACTOR: 0.1, "lr": 7.0}]
    set_learning_rate(groups, 0.5)
    assert [group["lr"] for group in groups] == [0.5, pytest.approx(0.05)]


def test_the_torch_optimizer_has_the_numbers_of_the_configuration():
    recipe = AdamW(CONFIG)
    optimizer = recipe.build(recipe.groups(list(LlamaStage(MODEL).parameters())))
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.93), 1e-7)
    assert [group[RATE_FACTOR] for group in optimizer.param_groups] == [1.0, 1.0, 1.0]


def test_state_that_is_made_early_is_what_torch_makes_at_the_first_step():
    weight = torch.nn.Parameter(torch.ones(3))
    recipe = AdamW(CONFIG)
    made = recipe.build([ParameterGroup([weight])])
    stepped = torch.optim.AdamW([weight], fused=True)
    spec = ShardSpec("weight", (3,))
    state = recipe.state_of(made, weight, spec)
    weight.grad = torch.zeros(3)
    stepped.step()
    theirs = stepped.state[weight]
    assert state.keys() == theirs.keys() == {"step", *recipe.kinds_of("weight", (3,))}
    assert all(state[k].dtype == theirs[k].dtype and state[k].shape == theirs[k].shape for k in state)
    assert recipe.steps_of(state) == 0 and recipe.steps_of(theirs) == 1
    recipe.set_steps(state, 5)
    assert recipe.steps_of(recipe.state_of(made, weight, spec)) == 5
    assert state_bytes(recipe, {"weight": (3,), "matrix": (2, 3)}) == 8 * 9
