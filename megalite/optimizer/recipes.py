"""The optimizers that a run can name."""

from collections.abc import Callable

from megalite.config.optimizer import OptimizerConfig
from megalite.optimizer.adamw import AdamW
from megalite.optimizer.muon import Muon
from megalite.optimizer.recipe import Recipe

RECIPES: dict[str, Callable[[OptimizerConfig], Recipe]] = {"adamw": AdamW, "muon": Muon}


def build_recipe(config: OptimizerConfig) -> Recipe:
    """The recipe of a run's optimizer."""
    return RECIPES[config.name](config)
