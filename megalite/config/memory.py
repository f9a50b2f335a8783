"""Section `memory`: what processes keep."""

from pydantic import Field

from megalite.config.section import NonNegativeInt, Section


class MemoryConfig(Section):
    """What a process keeps of the memory that it lets go of."""

    mapped_block_mib: NonNegativeInt | None = Field(
        None,
        le=2047,
        description="CPU: blocks of memory of so many MiB and more go back to the system when freed, which "
        "zeroes them when they come again; 0 keeps them, which is faster and takes up to 1.6 times as much. "
        "null is 0 where four times the planned memory of a node's ranks is there, else 4.",
    )
