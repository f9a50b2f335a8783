"""Section `schedule`: how long to train, and the learning rate."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megalite.config.section import NonNegativeFloat, NonNegativeInt, PositiveInt, Section


class ScheduleConfig(Section):
    """How long to train, and the learning rate along the way."""

    num_steps: PositiveInt = Field(200, description="Length of the run, in optimizer steps.")
    decay: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="Curve after warm-up; wsd (warm-up, stable, decay) falls only at the end.",
    )
    warmup_steps: NonNegativeInt = Field(20, description="Length of the linear warm-up, in steps.")
    decay_steps: PositiveInt | None = Field(
        None,
        description="Length of the decay, in steps: it begins after warm-up, for wsd it ends with the run; "
        "null means all steps after warm-up, for wsd a tenth of the run.",
    )
    min_learning_rate: NonNegativeFloat = Field(1e-4, description="Learning rate at the end of the decay.")

    @model_validator(mode="after")
    def _constant_does_not_decay(self) -> Self:
        if self.decay == "constant" and self.decay_steps is not None:
            raise ValueError(f"decay 'constant' takes no decay_steps, {self.decay_steps} given: remove it")
        return self
