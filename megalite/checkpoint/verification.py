"""The proof of an export: its weights are the checkpoint's, and two implementations agree on the logits."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.model import build_megalite_model, megalite_logits
from megalite.checkpoint.weights import Weights

LOGITS_TOLERANCE = 1e-4  # of the largest logit: float32 numbers, added in another order


@dataclass(frozen=True)
class Verification:
    """How far an export is from its checkpoint.

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
        """Whether the export is the checkpoint's model; not where a NaN is."""
        tolerance = LOGITS_TOLERANCE * self.largest_logit
        return self.weight_difference == 0 and self.logit_difference <= tolerance


def verify(weights: Weights, exported: Path) -> Verification:
    """Compare every weight of an exported folder, then the logits, with those of the checkpoint.

    Memory: the model twice, in float32. Raises CheckpointError as `largest_difference` does.
    """
    return Verification(largest_difference(weights, exported), *logits_difference(weights, exported))


def largest_difference(weights: Weights, exported: Path) -> float:
    """Largest |exported - checkpoint| over all weights, read with the safetensors library.

    Raises CheckpointError unless both have the same tensors, in the same shape and dtype.
    """
    files = _exported_files(exported)
    different = files.keys() ^ weights.shapes.keys()
    if different:
        raise CheckpointError(f"{min(different)} is only in one of {weights.checkpoint} and {exported}")
    largest = torch.zeros((), dtype=torch.float64)
    for name, file in files.items():
        expected = weights.read(name)
        with safe_open(file, framework="pt") as source:
            actual = source.get_tensor(name)
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            raise CheckpointError(f"{exported} has {name} as {actual.dtype} {list(actual.shape)}")
        difference = (actual.double() - expected.double()).abs().max()
        largest = torch.maximum(largest, difference)  # keeps a NaN, unlike max()
    return largest.item()


def _exported_files(exported: Path) -> dict[str, Path]:
    """The file of every tensor, as the files themselves tell."""
    files: dict[str, Path] = {}
    for path in sorted(exported.glob("*.safetensors")):
        with safe_open(path, framework="pt") as source:
            files |= dict.fromkeys(source.keys(), path)
    return files


@torch.no_grad()
def logits_difference(weights: Weights, exported: Path) -> tuple[float, float]:
    """(largest difference, largest logit) on random tokens, both in float32 from the weights as exported."""
    from transformers import AutoModelForCausalLM

    model, generator = weights.model, torch.Generator().manual_seed(0)
    length = min(model.max_position_embeddings, 128)
    tokens = torch.randint(model.vocab_size, (2, length), generator=generator)
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)(tokens).logits
    ours = megalite_logits(build_megalite_model(weights), tokens)
    return (theirs - ours).abs().max().item(), theirs.abs().max().item()
