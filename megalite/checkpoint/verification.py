"""The proof of an export or import: weights are equal, and two implementations agree on the logits."""

from dataclasses import dataclass
from pathlib import Path

import torch

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.hf_folder import HFFolder
from megalite.checkpoint.model import build_megalite_model, megalite_logits
from megalite.checkpoint.weights import Weights

LOGITS_TOLERANCE = 1e-4  # of the largest logit: float32 numbers, added in another order


@dataclass(frozen=True)
class Verification:
    """How far a Hugging Face folder is from a checkpoint.

    Attributes:
        weight_difference: the largest, after the checkpoint's weights were rounded; 0 or it is wrong.
        logit_difference: the largest, transformers against megalite.
        largest_logit: of transformers.
    """

    weight_difference: float
    logit_difference: float
    largest_logit: float

    @property
    def holds(self) -> bool:
        """Whether both are the same model; not where a NaN is."""
        tolerance = LOGITS_TOLERANCE * self.largest_logit
        return self.weight_difference == 0 and self.logit_difference <= tolerance

    def __str__(self) -> str:
        return (
            f"largest difference of a weight after the cast: {self.weight_difference:g}\n"
            f"largest difference of a logit, transformers against megalite: {self.logit_difference:g} "
            f"(largest logit: {self.largest_logit:g})" + "\nverified" * self.holds
        )


def verify_export(weights: Weights, exported: Path) -> Verification:
    """Compare every weight of an exported folder, then the logits, with those of the checkpoint.

    Memory: the model twice, in float32. Raises CheckpointError unless the folder holds exactly the tensors of
    the checkpoint, in the same shape and dtype.
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

    Memory: the model twice, in float32. Raises CheckpointError unless the folder holds the model's tensors.
    """
    return Verification(largest_difference(weights, folder), *logits_difference(weights, folder.path))


def largest_difference(weights: Weights, folder: HFFolder) -> float:
    """Largest |folder's - checkpoint's| over all weights, or NaN. Raises CheckpointError as `verify` does."""
    folder.check(weights.parts.values())
    largest = torch.zeros((), dtype=torch.float64)
    for name in weights.parts:
        difference = (folder.tensors[name].double() - weights.read(name).double()).abs().max()
        largest = torch.maximum(largest, difference)  # keeps a NaN, unlike max()
    return largest.item()


@torch.no_grad()
def logits_difference(weights: Weights, folder: Path) -> tuple[float, float]:
    """(largest difference, largest logit) on random tokens, both in float32 from the weights as exported."""
    from transformers import AutoModelForCausalLM

    model, generator = weights.model, torch.Generator().manual_seed(0)
    length = min(model.max_position_embeddings, 128)
    tokens = torch.randint(model.vocab_size, (2, length), generator=generator)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    ours = megalite_logits(build_megalite_model(weights), tokens)
    return (theirs - ours).abs().max().item(), theirs.abs().max().item()
