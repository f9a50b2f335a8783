"""The optimizers that a run can name."""

from collections.abc import Callable

from megalite.config.optimizer import OptimizerConfig
from megalite.kernels.adamw import AdamUpdate
from megalite.optimizer.adamw import AdamW
from megalite.optimizer.muon import Muon
from megalite.optimizer.recipe import Recipe

RECIPES: dict[str, Callable[[OptimizerConfig, AdamUpdate | None], Recipe]] = {"adamw": AdamW, "muon": Muon}


def build_recipe(config: OptimizerConfig, update: AdamUpdate | None = None) -> Recipe:
    """The recipe of a run's optimizer.

    update: what computes AdamW, see kernels/adamw.py; None for torch.
    """
    return RECIPES[config.name](config, update)
