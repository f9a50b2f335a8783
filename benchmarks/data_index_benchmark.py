"""The document, sample and shuffle index of a million documents of 50 to 2,000 tokens: two epochs of samples
of 1,024 tokens, in memory. megatron-core's sample index is compiled C++; megalite has numpy only.

The memory is what building adds to a fresh process at its peak, the result included.
"""

import warnings
from collections.abc import Callable

import numpy as np

from benchmarks.measurement import Measurement, PeakMemory, in_fresh_process, median_seconds
from benchmarks.token_files import random_lengths
from megalite.data.gpt_dataset import build_sample_index, plan_epochs

TITLE = "Data: building indices"
PEER = "megatron-core"
NUM_DOCUMENTS, SEQ_LENGTH, SEED = 1_000_000, 1024, 1234
ROUNDS = 9

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def measure() -> list[Measurement]:
    """Time and memory of both, after a check that they make the same."""
    lengths = random_lengths(NUM_DOCUMENTS)
    num_samples = (2 * int(lengths.sum(dtype=np.int64)) - 1) // SEQ_LENGTH
    ours, theirs = megalite_builder(lengths, num_samples), megatron_builder(lengths, num_samples)
    if not all(np.array_equal(a, b) for a, b in zip(ours(), theirs(), strict=True)):
        raise RuntimeError("the two indices differ")
    seconds = median_seconds({"ours": ours, "theirs": theirs}, ROUNDS)
    peaks = [in_fresh_process(peak_bytes, name, num_samples) / 2**20 for name in ("megalite", "megatron")]
    return [
        Measurement("build", "s", seconds["ours"], seconds["theirs"], higher_is_better=False),
        Measurement("peak memory", "MiB", peaks[0], peaks[1], higher_is_better=False),
    ]


def megalite_builder(lengths: np.ndarray, num_samples: int) -> Callable[[], Arrays]:
    """What GPTDataset does once its files are open."""

    def build() -> Arrays:
        epochs = plan_epochs(int(lengths.sum(dtype=np.int64)), SEQ_LENGTH, num_samples)
        return build_sample_index(lengths, (0, len(lengths)), SEQ_LENGTH, epochs, SEED)

    return build


def megatron_builder(lengths: np.ndarray, num_samples: int) -> Callable[[], Arrays]:
    """What its GPTDataset does once its files are open, without writing the result."""
    warnings.simplefilter("ignore")
    from megatron.core.datasets import gpt_dataset, helpers

    indices = np.arange(len(lengths), dtype=np.int32)

    def build() -> Arrays:
        tokens = int(np.sum(lengths[indices]))
        epochs = -(-(num_samples * SEQ_LENGTH + 1) // tokens)
        random = np.random.RandomState(SEED)
        documents = gpt_dataset._build_document_index(indices, epochs, random, False)
        samples = helpers.build_sample_idx(lengths.copy(), documents, SEQ_LENGTH, epochs, tokens, True, True)
        return (
            documents,
            samples,
            gpt_dataset._build_shuffle_index(len(samples) - 1, len(samples) - 1, random),
        )

    return build


def peak_bytes(name: str, num_samples: int) -> int:
    """Runs in a process of its own."""
    builder = megalite_builder if name == "megalite" else megatron_builder
    build = builder(random_lengths(NUM_DOCUMENTS), num_samples)
    with PeakMemory() as memory:
        kept = build()
    return memory.bytes if kept else 0
