"""The proof of an export or import: weights are equal, and two implementations agree on the logits."""

from dataclasses import dataclass
from math import isnan
from pathlib import Path

import torch

from megalite.checkpoint.departure import Departure, find_departure
from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.hf_folder import HFFolder
from megalite.checkpoint.model import build_megalite_model, megalite_logits
from megalite.checkpoint.weights import Weights
from megalite.config.model import ModelConfig
from megalite.model.flops import num_parameters

LOGITS_TOLERANCE = 1e-5  # of the largest logit: float32 numbers, added in another order


@dataclass(frozen=True)
class Verification:
    """How far a Hugging Face folder is from a checkpoint.

    Attributes:
        weight_difference: the largest, after the checkpoint's weights were rounded; 0 or it is wrong.
        logit_difference: the largest, transformers against megalite.
        largest_logit: of transformers.
        weight: that differs most, where any does.
        departure: where the two implementations part, if they do.
    """

    weight_difference: float
    logit_difference: float
    largest_logit: float
    weight: str | None = None
    departure: Departure | None = None

    @property
    def holds(self) -> bool:
        """Whether both are the same model; not where a NaN is."""
        return self.weight_difference == 0 and is_near(self.logit_difference, self.largest_logit)

    def __str__(self) -> str:
        where = f", of {self.weight}" if self.weight else ""
        lines = [
            f"largest difference of a weight after the cast: {self.weight_difference:g}{where}",
            f"largest difference of a logit, transformers against megalite: {self.logit_difference:g} "
            f"(largest logit: {self.largest_logit:g})",
        ]
        lines += [str(self.departure)] * (self.departure is not None)
        return "\n".join(lines + ["verified"] * self.holds)


def is_near(logit_difference: float, largest_logit: float) -> bool:
    """Whether logits differ by rounding alone."""
    return logit_difference <= LOGITS_TOLERANCE * largest_logit


def bytes_needed(model: ModelConfig) -> int:
    """Memory of a verification: the model twice, in float32."""
    return 2 * 4 * num_parameters(model)


def verify_export(weights: Weights, exported: Path) -> Verification:
    """Compare every weight of an exported folder, then the logits, with those of the checkpoint.

    Raises CheckpointError unless the folder holds exactly the checkpoint's tensors, in their shape and dtype.
    """
    folder = HFFolder(exported)
    different = folder.tensors.keys() ^ weights.parts.keys()
    if different:
        raise CheckpointError(f"{min(different)} is only in one of {weights.checkpoint} and {exported}")
    for name, tensor in folder.tensors.items():
        if tensor.dtype != weights.dtype_of(name):
            raise CheckpointError(f"{exported} has {name} as {tensor.dtype}, not {weights.dtype_of(name)}")
    return verify(weights, folder)


def verify(weights: Weights, folder: HFFolder) -> Verification:
    """Compare every weight of a folder, then the logits, with those of a checkpoint.

    Where the logits differ, both models compute once more and the first part that differs is named.

    Raises CheckpointError unless the folder holds the model's tensors.
    """
    weight, weight_difference = largest_difference(weights, folder)
    logit_difference, largest_logit, departure = compare_logits(weights, folder.path)
    return Verification(weight_difference, logit_difference, largest_logit, weight, departure)


def largest_difference(weights: Weights, folder: HFFolder) -> tuple[str | None, float]:
    """The weight with the largest |folder's - checkpoint's|, or with a NaN; (None, 0) where all are equal.

    Raises CheckpointError as `verify` does.
    """
    folder.check(weights.parts.values())
    worst, largest = None, 0.0
    for name in weights.parts:
        difference = (folder.tensors[name].double() - weights.read(name).double()).abs().max().item()
        if isnan(difference):
            return name, difference
        if difference > largest:
            worst, largest = name, difference
    return worst, largest


@torch.no_grad()
def compare_logits(weights: Weights, folder: Path) -> tuple[float, float, Departure | None]:
    """(largest difference, largest logit, where both part), on random tokens and in float32."""
    from transformers import AutoModelForCausalLM

    model, generator = weights.model, torch.Generator().manual_seed(0)
    length = min(model.max_position_embeddings, 128)
    tokens = torch.randint(model.vocab_size, (2, length), generator=generator)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = build_megalite_model(weights)
    expected = theirs(tokens).logits
    difference = (expected - megalite_logits(ours, tokens)).abs().max().item()
    largest = expected.abs().max().item()
    agree = is_near(difference, largest)
    return difference, largest, None if agree else find_departure(ours, theirs, tokens, LOGITS_TOLERANCE)
