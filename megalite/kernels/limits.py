"""Sizes that a kernel's memory depends on (pure arithmetic)."""

BLOCK_BYTES = 256  # attention in blocks: rows of a block, times the size of a number
KEPT_TOKENS = 512  # attention in blocks: up to so many keys their probabilities are kept for backward
