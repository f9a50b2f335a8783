"""Section `optimizer`: which one, and its settings."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megalite.config.muon import MuonConfig
from megalite.config.section import NonNegativeFloat, PositiveFloat, Section


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay (arXiv 1711.05101), or Muon for matrices and AdamW for the rest."""

    name: Literal["adamw", "muon"] = Field("adamw", description="Optimizer.")
    implementation: Literal["auto", "torch", "apex", "deepspeed"] = Field(
        "auto",
        description="What computes AdamW's update, also that beside Muon: torch's fused one, on a GPU "
        "that of NVIDIA's apex, or DeepSpeed's, compiled at its first use. Checkpoints are the same.",
    )
    learning_rate: PositiveFloat = Field(1e-3, description="Highest learning rate, reached after warm-up.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the gradient's running mean, per step.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the squared gradient's mean, per step.")
    epsilon: PositiveFloat = Field(1e-8, description="Added to the root of the squared gradient's mean.")
    weight_decay: NonNegativeFloat = Field(0.1, description="Decay of the weights, per unit learning rate.")
    muon: MuonConfig = Field(default_factory=MuonConfig, description="Settings of Muon alone.")

    @model_validator(mode="after")
    def _muon_is_used(self) -> Self:
        if self.name != "muon" and self.muon != MuonConfig():
            raise ValueError(
                f"name {self.name!r} has no use for the settings of muon: set name=muon, or remove them"
            )
        return self
