"""What fine-tuning and preference tuning add to a run."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megalite.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, Section


class LoraConfig(Section):
    """Low-rank adapters of frozen linear layers, W + scale B A (LoRA: Hu 2021, arXiv 2106.09685)."""

    rank: NonNegativeInt = Field(
        0, description="Rank of the adapters; 0 means none, all weights are trained."
    )
    alpha: PositiveFloat = Field(16.0, description="Scale of the adapters, over rank.")
    rank_stabilized: bool = Field(
        False, description="Whether the scale is alpha over the root of the rank (arXiv 2312.03732)."
    )
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="Linear layers that have an adapter, by the last part of their names.",
    )
    start_from: str | None = Field(
        None, description="Folder with an adapter in the format of PEFT, to begin with; null means a new one."
    )

    @model_validator(mode="after")
    def _a_start_has_a_rank(self) -> Self:
        if self.start_from is not None and not self.rank:
            raise ValueError(f"start_from {self.start_from} and rank 0: set rank to that of the adapter")
        return self

    @property
    def scale(self) -> float:
        """What the adapters' outputs are multiplied with."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


class PreferenceConfig(Section):
    """How pairs of answers, a chosen and a rejected one, or answers that are good or bad become a loss."""

    loss: Literal["dpo", "simpo", "kto"] = Field(
        "dpo",
        description="DPO against the weights that the run starts with (arXiv 2305.18290); SimPO, with "
        "mean log-probabilities and no reference (arXiv 2405.14734); or KTO, of answers without pairs, "
        "against the weights of the start too (arXiv 2402.01306).",
    )
    beta: PositiveFloat = Field(0.1, description="Scale of the log-probabilities within the loss.")
    margin: NonNegativeFloat = Field(
        0.0, description="SimPO: by how much a chosen answer's reward is to exceed a rejected one's."
    )
    desirable_weight: PositiveFloat = Field(1.0, description="KTO: weight of answers that are desirable.")
    undesirable_weight: PositiveFloat = Field(1.0, description="KTO: weight of those that are not.")

    @model_validator(mode="after")
    def _options_are_of_the_loss(self) -> Self:
        losses = {"margin": "simpo", "desirable_weight": "kto", "undesirable_weight": "kto"}
        for name, loss in losses.items():
            value, default = getattr(self, name), type(self).model_fields[name].default
            if self.loss != loss and value != default:
                raise ValueError(
                    f"{name} {value} belongs to loss {loss}, and loss is {self.loss}: remove one"
                )
        return self
