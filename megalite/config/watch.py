"""Section `watch`: when a rank counts as hanging."""

from pydantic import Field

from megalite.config.section import NonNegativeFloat, Section


class WatchConfig(Section):
    """When a rank counts as hanging: then RUN_DIR/stacks gets all stacks, and the job ends with status 76.

    0 seconds watch for nothing. A limit but for start-up grows with what a place has taken so far.
    """

    stopped_seconds: NonNegativeFloat = Field(
        60.0,
        description="Seconds in which nothing is heard of a rank that is stopped, or whose node is; more of "
        "them with more than 5,000 ranks.",
    )
    step_seconds: NonNegativeFloat = Field(
        300.0,
        description="Seconds without progress while a step reads its data, goes forward and backward, or is "
        "in the optimizer; less than the timeouts of the collectives, which blame who waits.",
    )
    factor: NonNegativeFloat = Field(
        10.0, description="Times the longest stay so far that a place is allowed, where that is more."
    )
    start_up_seconds: NonNegativeFloat = Field(
        3600.0, description="Seconds without progress until the first step is done; silence is allowed too."
    )
    saving_seconds: NonNegativeFloat = Field(1800.0, description="Seconds that saving may take.")
    evaluation_seconds: NonNegativeFloat = Field(
        3600.0, description="Seconds that a batch of a validation, or an evaluation on tasks, may take."
    )
