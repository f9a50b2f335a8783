"""The command that converts to and from Megatron, against megatron-core's own GPTModel on the CPU."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megalite.checkpoint.load import read_config
from megalite.checkpoint.model import build_megalite_model, megalite_logits
from megalite.checkpoint.weights import Weights
from tests.checkpoint.megatrons import VARIANTS, arguments, fixed_tokens, load_gpt, save_gpt
from tests.harness import run_distributed
from tools import convert_megatron


def import_to(where: Path, *extra: str) -> int:
    output = where / "run" / "checkpoints"
    return convert_megatron.main(
        ["--from-megatron", str(where / "megatron"), "--output", str(output), *extra]
    )


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
    print((ours - theirs).abs().max() / theirs.abs().max())
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def saved(
    where: Path, variant: str, tp_size: int = 1, pp_size: int = 1, distributed: bool = False
) -> torch.Tensor:
    """Megatron's checkpoint, and its logits."""
    args = arguments(variant, tp_size, pp_size)
    return run_distributed(save_gpt, tp_size * pp_size, args, where / "megatron", distributed)[-1]


def layout_options(tp_size: int, pp_size: int) -> list[str]:
    """The same padded vocabulary for any."""
    sizes = ["--tp-size", str(tp_size), "--pp-size", str(pp_size)]
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


CASES = [
    *((variant, tp_size, 1) for variant in VARIANTS for tp_size in (1, 2)),
    ("tied", 1, 2),
    ("plain", 2, 2),
]


@pytest.mark.parametrize(("variant", "tp_size", "pp_size"), CASES)
def test_a_model_of_megatron_gives_the_same_logits_here_and_goes_back_bit_for_bit(
    tmp_path, variant, tp_size, pp_size
):
    theirs = saved(tmp_path, variant, tp_size, pp_size)
    assert import_to(tmp_path) == 0
    ours = our_logits(tmp_path)
    assert ours.shape[-1] == 101
    assert_same_logits(ours, theirs)
    same_as_theirs = ["--dtype", "float32", "--transformer-impl", "local"]
    assert export_to(tmp_path, *layout_options(tp_size, pp_size), *same_as_theirs) == 0
    assert_same_shards(shards(tmp_path / "back"), shards(tmp_path / "megatron"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_export_is_loaded_by_megatron_under_its_own_arguments(tmp_path, variant):
    """In another layout than it came in, every name in its place."""
    saved(tmp_path, variant)
    assert import_to(tmp_path) == 0
    same_as_theirs = ["--dtype", "float32", "--transformer-impl", "local"]
    assert export_to(tmp_path, *layout_options(2, 1), *same_as_theirs) == 0
    theirs = run_distributed(load_gpt, 2, tmp_path / "back")[-1]
    assert_same_logits(our_logits(tmp_path), theirs)


@pytest.mark.parametrize(
    ("variant", "tp_size", "pp_size"), [("plain", 1, 1), ("tied", 2, 1), ("plain", 1, 2), ("experts", 2, 1)]
)
def test_the_distributed_form_gives_the_same_logits(tmp_path, variant, tp_size, pp_size):
    theirs = saved(tmp_path, variant, tp_size, pp_size, distributed=True)
    assert import_to(tmp_path) == 0
    assert_same_logits(our_logits(tmp_path), theirs)
