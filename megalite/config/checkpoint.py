"""Section `checkpoint`: when a run is saved, and what is kept."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megalite.config.section import NonNegativeInt, PositiveInt, Section


class CheckpointConfig(Section):
    """When the run is saved, and what is kept."""

    save_every_steps: NonNegativeInt = Field(100, description="Steps between checkpoints; 0 means none.")
    resume: bool = Field(True, description="Whether to continue from the newest complete checkpoint.")
    start_from: str | None = Field(
        None,
        description="Checkpoint (RUN_DIR, its checkpoints or one step) or Hugging Face folder with whose "
        "weights a run begins that has no checkpoint of its own; null means random weights.",
    )
    keep_last: NonNegativeInt = Field(2, description="Number of newest checkpoints to keep; 0 means all.")
    keep_every_steps: NonNegativeInt = Field(
        0, description="Those of steps that this divides are kept as well; 0 means none."
    )
    keep_best: NonNegativeInt = Field(
        0, description="Number of checkpoints with the lowest validation loss to keep as well."
    )
    save_at_end: bool = Field(True, description="Whether to save after the last step.")
    asynchronous: bool = Field(
        True,
        description="Whether training goes on while a checkpoint is written, from a copy in host memory.",
    )
    local_dir: str | None = Field(
        None,
        description="Folder on each node's own disk in which a checkpoint is complete first, before it is "
        "copied to RUN_DIR/checkpoints; null means that it is written there at once.",
    )
    shared_every_saves: PositiveInt = Field(
        1,
        description="Of the saves in local_dir, how many there are for one that is copied; the first of a "
        "job is, and so is the newest when the job ends or RUN_DIR/save asks for it.",
    )
    on_failure: Literal["continue", "stop"] = Field(
        "continue",
        description="What a checkpoint that cannot be written does to the run; where the last one cannot, "
        "the run ends with exit status 74 in any case.",
    )

    @model_validator(mode="after")
    def _others_stay_beside_the_newest(self) -> Self:
        if not self.keep_last and (self.keep_every_steps or self.keep_best):
            raise ValueError("keep_last 0 keeps all: set it, or neither keep_every_steps nor keep_best")
        return self

    @model_validator(mode="after")
    def _what_is_not_shared_is_local(self) -> Self:
        if self.shared_every_saves > 1 and self.local_dir is None:
            raise ValueError(
                f"shared_every_saves is {self.shared_every_saves} and local_dir is null: say where the "
                "others go with checkpoint.local_dir, or set shared_every_saves to 1"
            )
        return self
