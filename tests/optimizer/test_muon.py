"""The recipe of Muon: what it steps, what AdamW steps beside it, and equally many groups on every stage."""

import pytest

from megalite.config.muon import MuonConfig
from megalite.config.optimizer import OptimizerConfig
from megalite.model.llama import LlamaStage
from megalite.model.share import StageShare
from megalite.model.table import model_table
from megalite.optimizer.muon import NUMBER, Muon, is_orthogonalized
from megalite.optimizer.recipe import state_bytes
from megalite.parallel.shard import spec_of
from tests.trainers import EXPERTS, MODEL, NORMED_EXPERTS, TIED

CONFIG = OptimizerConfig(
    name="muon", weight_decay=0.25, muon=MuonConfig(adamw_learning_rate_factor=0.5, momentum=0.8)
)
STAGES = {
    "all": StageShare(range(4)),
    "first": StageShare(range(2), has_head=False),
    "middle": StageShare(range(1, 3), has_embedding=False, has_head=False),
    "first of experts, dense": StageShare(range(1), has_head=False),
    "last": StageShare(range(3, 4), has_embedding=False),
}


@pytest.mark.parametrize(
    "model", [MODEL, TIED, EXPERTS, NORMED_EXPERTS], ids=["plain", "tied", "experts", "norms"]
)
def test_matrices_between_features_are_its_own_by_the_kinds_of_the_table(model):
    for row in model_table(model):
        is_hidden = row.kind in ("matrix", "expert") and not row.name.endswith("mlp.gate.weight")
        assert is_orthogonalized(row.name, row.shape) == is_hidden, row.name


@pytest.mark.parametrize("model", [MODEL, TIED, EXPERTS], ids=["plain", "tied", "experts"])
@pytest.mark.parametrize("share", STAGES.values(), ids=STAGES)
def test_every_stage_has_four_groups_of_one_kind_each(model, share):
    stage = LlamaStage(model, share=share)
    groups = Muon(CONFIG).groups(list(stage.parameters()))
    assert len(groups) == 4
    grouped = [id(p) for group in groups for p in group.parameters]
    assert sorted(grouped) == sorted(id(p) for p in stage.parameters())
    for number, group in enumerate(groups):
        specs = [spec_of(p) for p in group.parameters]
        (is_muon,) = {is_orthogonalized(spec.name, spec.full_shape) for spec in specs}
        assert group.settings[NUMBER] == (number if is_muon else None)
        assert group.learning_rate_factor == (1.0 if is_muon else 0.5)
        assert group.settings["weight_decay"] == (0.0 if len(specs[0].full_shape) == 1 else 0.25)
        assert not any(spec.is_tied for spec in specs) or len(specs) == 1


def test_a_matrix_has_half_the_state():
    shapes = {
        "model.layers.0.mlp.up_proj.weight": (6, 4),
        "lm_head.weight": (10, 4),
        "model.norm.weight": (4,),
    }
    assert state_bytes(Muon(CONFIG), shapes) == 4 * 24 + 8 * 44
