"""Section `memory`: what processes keep."""

from pydantic import Field

from megalite.config.section import NonNegativeInt, Section


class MemoryConfig(Section):
    """What a process keeps of the memory that it lets go of."""

    mapped_block_mib: NonNegativeInt = Field(
        4,
        description="CPU: blocks of memory of so many MiB and more go back to the system when freed; 0 "
        "leaves glibc its own rule, which is faster with small models, and holds several times as much.",
    )
