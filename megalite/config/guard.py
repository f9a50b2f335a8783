"""Section `guard`: steps that are not taken."""

from typing import Literal

from pydantic import Field

from megalite.config.section import NonNegativeFloat, NonNegativeInt, PositiveInt, Section


class GuardConfig(Section):
    """Steps that are not taken: those whose loss or gradient norm is no number, and spikes."""

    max_skipped_in_a_row: NonNegativeInt = Field(
        3, description="Steps that may be skipped one after another; one more ends the run."
    )
    spike_sigma: NonNegativeFloat = Field(
        0.0,
        description="A spike is a loss or norm above the mean of the last steps by so many standard "
        "deviations; 0 means that no number is one.",
    )
    window_steps: PositiveInt = Field(64, description="Steps that a spike is measured against.")
    on_spike: Literal["skip", "roll_back"] = Field(
        "skip",
        description="Whether such a step is skipped, or the run goes back to its newest checkpoint and "
        "leaves the samples of that step out.",
    )
    max_rollbacks: NonNegativeInt = Field(
        3, description="How often a run may go back; then such steps are skipped."
    )
    check_copies_every_steps: NonNegativeInt = Field(
        0,
        description="Steps between comparisons of all state that several ranks hold, bit by bit; 0 means "
        "never. A difference ends the run and names rank and tensor.",
    )

    @property
    def most_rollbacks(self) -> int:
        """How many batches the run may come to leave out."""
        return self.max_rollbacks if self.on_spike == "roll_back" else 0
