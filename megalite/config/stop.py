"""Section `stop`: what ends a run early."""

from pydantic import Field

from megalite.config.section import NonNegativeInt, PositiveFloat, Section


class StopConfig(Section):
    """What ends a run before its last step, with a checkpoint and exit status 75; signals do so always."""

    after_minutes: PositiveFloat | None = Field(
        None, description="Minutes after the start of the job; null means none."
    )
    after_starts: NonNegativeInt = Field(
        0,
        description="Starts in a row that came to no newer checkpoint, after which the run is not started "
        "again (exit status 93); 0 means any number.",
    )
