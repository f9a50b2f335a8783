"""Sizes of the memory through which ranks of a node exchange tensors (pure arithmetic)."""

SLOTS = 4  # of each rank: exchanges that may be under way at once
SLOT_BYTES = 16 * 2**20


def fits(num_bytes: int, entries: int = 1) -> bool:
    """Whether `entries` tensors of so many bytes go into a slot."""
    return entries * num_bytes <= SLOT_BYTES
