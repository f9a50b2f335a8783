"""How a vocabulary is padded and its logits are taken in parts (pure arithmetic)."""

from math import ceil

CHUNK_LOGITS = 1 << 28  # of a rank at a time: 1 GiB in fp32


def padded_vocab_size(vocab_size: int, tp_size: int, multiple: int = 128) -> int:
    """The vocabulary rounded up so that each rank holds a multiple of `multiple` rows.

    Padding exists only in memory: never in a checkpoint, an export, or the loss.
    """
    return ceil(vocab_size / (multiple * tp_size)) * multiple * tp_size
