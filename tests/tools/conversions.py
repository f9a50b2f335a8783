"""What tests of conversions to and from Megatron share.

A folder has Megatron's checkpoint in `megatron`, ours in `run/checkpoints`, and what goes back in `back`.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.load import TensorReader, read_config
from megalite.checkpoint.model import build_megalite_model, megalite_logits
from megalite.checkpoint.weights import Weights
from tests.checkpoint.megatrons import arguments, fixed_tokens, save_gpt, world_size
from tests.harness import run_distributed
from tools import convert_megatron


def import_to(where: Path, *extra: str) -> int:
    output = where / "run" / "checkpoints"
    return convert_megatron.main(
        ["--from-megatron", str(where / "megatron"), "--output", str(output), *extra]
    )


LIKE_MEGATRON = ["--dtype", "float32", "--transformer-impl", "local"]  # of tests/checkpoint/megatrons.py


def export_to(where: Path, *extra: str) -> int:
    source = str(where / "run" / "checkpoints")
    return convert_megatron.main(["--to-megatron", source, "--output", str(where / "back"), *extra])


def our_logits(where: Path) -> torch.Tensor:
    checkpoint = where / "run" / "checkpoints" / "step-00000000"
    return megalite_logits(
        build_megalite_model(Weights(checkpoint, read_config(checkpoint).model)), fixed_tokens()
    )


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Of the tokens; Megatron has some for its padding too."""
    theirs = theirs[..., : ours.shape[-1]]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def saved(
    where: Path,
    variant: str,
    tp_size: int = 1,
    pp_size: int = 1,
    ep_size: int = 1,
    *,
    distributed: bool = False,
    **others: Any,
) -> torch.Tensor:
    """Megatron's checkpoint, and its logits."""
    args = arguments(variant, tp_size, pp_size, ep_size, **others)
    return run_distributed(save_gpt, world_size(args), args, where / "megatron", distributed)[-1]


def layout_options(tp_size: int = 1, pp_size: int = 1, ep_size: int = 1) -> list[str]:
    """The same padded vocabulary for any."""
    sizes = ["--tp-size", str(tp_size), "--pp-size", str(pp_size), "--ep-size", str(ep_size)]
    return [*sizes, "--make-vocab-size-divisible-by", str(112 // tp_size)]


def shards(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """All tensors of the classic form, by folder of the rank and name."""
    with torch.serialization.safe_globals([Namespace]):
        states = {file.parent.name: torch.load(file)["model"] for file in folder.glob("iter_*/*/*.pt")}
    return {(rank, name): t for rank, state in states.items() for name, t in state.items() if t is not None}


def assert_same_shards(ours: dict, theirs: dict) -> None:
    """Bit for bit, but for the rows of the padded vocabulary, which are zeros here."""
    assert ours.keys() == theirs.keys() and len(theirs) > 10
    for (rank, name), tensor in theirs.items():
        found, rows = ours[rank, name], len(tensor)
        assert found.dtype == tensor.dtype
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            rows = max(0, min(rows, 101 - int(rank[8:10]) * rows))
        assert found[:rows].equal(tensor[:rows]) and not found[rows:].any(), (rank, name)


def assert_same_checkpoint(one: Path, other: Path) -> None:
    first, second = (TensorReader(where / "run" / "checkpoints" / "step-00000000") for where in (one, other))
    assert first.manifest.tensors == second.manifest.tensors
    for entry in first.manifest.tensors:
        assert first.read(entry.kind, entry.name).equal(second.read(entry.kind, entry.name)), entry.name
