"""A checkpoint of adapters is read as the weights that it makes of its base.

Tolerances: 1e-5 of the largest logit, as of a conversion: float32 numbers, added in another order; and 1e-6
of the largest weight, for a float32 sum of four products against float64.
"""

import json
import shutil

import pytest
import torch

import megalite
from megalite.checkpoint.adapter import open_weights
from megalite.checkpoint.agreement import alone
from megalite.checkpoint.base import Base, base_of
from megalite.checkpoint.format import CheckpointError, list_steps
from megalite.checkpoint.hf import export
from megalite.checkpoint.load import TensorReader, find_checkpoint, load_pieces
from megalite.checkpoint.model import build_megalite_model, load_stage, megalite_logits
from megalite.checkpoint.retention import Retention
from megalite.checkpoint.save import save_checkpoint
from megalite.checkpoint.verification import verify_export
from megalite.checkpoint.weights import Weights
from megalite.config.tuning import LoraConfig
from megalite.parallel.plan import LayerPlan
from tests.checkpoint.adapters import LORA, merged, random_factors, save_factors, save_tuned, unmerged_stage
from tests.checkpoint.llamas import logits, tensors_of
from tests.checkpoint.worlds import Cut, blank, cut_all, run_world, save_world

TOKENS = torch.randint(257, (2, 48), generator=torch.Generator().manual_seed(1))
STABLE = LoraConfig(rank=2, alpha=3.0, rank_stabilized=True, targets=["v_proj", "down_proj"])


def near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Within a tolerance of the largest."""
    atol = tolerance * wanted.abs().max().item() if wanted.numel() else 0
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("variant", "lora"), [("plain", LORA), ("qwen2", STABLE), ("biases", LORA), ("experts", LORA)]
)
def test_merged_equals_unmerged_wherever_a_model_is_read(tmp_path, variant, lora):
    tuned = save_tuned(tmp_path, variant, lora)
    expected = megalite_logits(unmerged_stage(tuned, tuned.factors), TOKENS)
    weights = Weights(tuned.checkpoint, tuned.run.model)
    near(megalite_logits(build_megalite_model(weights), TOKENS), expected, 1e-5)
    near(logits(megalite.load(tmp_path / "tuned")), expected, 1e-5)
    stage = load_stage(tuned.checkpoint, tuned.run.model, LayerPlan(dtype=torch.float32))
    near(megalite_logits(stage, TOKENS), expected, 1e-5)
    assert (logits(tuned.llama) - expected).abs().max() > 0.1  # the control: adapters change the model
    exported = export(weights, tmp_path / "hf")
    assert verify_export(weights, exported).holds


def test_any_box_and_flat_range_is_merged(tmp_path):
    """As tensor parallelism and ZeRO ask for it, with borders within rows."""
    tuned = save_tuned(tmp_path)
    full = {(kind, name): tensor.float() for (kind, name), tensor in merged(tuned).items()}

    def cut_of(name: str, tensor: torch.Tensor) -> Cut:
        columns = (0.0, 0.4, 1.0)
        dim = None if tensor.dim() == 1 else int(name.endswith(("o_proj.weight", "down_proj.weight")))
        return Cut(dim, columns, (0.0, 0.013, 0.5071, 0.5072, 1.0))

    wanted = cut_all(full, cut_of)
    found = [blank(pieces) for pieces in wanted]
    options = {"ignore_other_kinds": True, "open_reader": open_weights}
    run_world(
        len(found),
        lambda rank, gather: load_pieces(tuned.checkpoint, found[rank], gather=gather, **options),
    )
    for mine, theirs in zip(found, wanted, strict=True):
        for piece, expected in zip(mine, theirs, strict=True):
            near(piece.tensor, expected.tensor, 1e-6)


def test_a_sum_is_rounded_once(tmp_path):
    tuned = save_tuned(tmp_path)
    reader, name = open_weights(tuned.checkpoint), "model.layers.1.mlp.up_proj.weight"
    whole = reader.read("weight", name)
    box = reader.read_box("weight", name, (8, 3), (20, 11), torch.bfloat16)
    exact = merged(tuned)["weight", name]
    assert box.equal(whole[8:28, 3:14].bfloat16()) and not box.float().equal(whole[8:28, 3:14])
    twice = tensors_of(tuned.llama)["weight", name].bfloat16() + (
        exact - tensors_of(tuned.llama)["weight", name]
    )
    assert not box.equal(twice[8:28, 3:14].bfloat16())  # the control: the base rounded first


def test_adapters_of_adapters_are_added(tmp_path):
    first = save_tuned(tmp_path)
    factors = random_factors(first.llama, STABLE, seed=6)
    run = first.run.model_copy(update={"lora": STABLE})
    second = save_factors(tmp_path / "second", run, first.checkpoint, factors)
    name = "model.layers.0.self_attn.v_proj"
    product = factors[f"{name}.lora_B.weight"].double() @ factors[f"{name}.lora_A.weight"].double()
    expected = merged(first)["weight", f"{name}.weight"] + 3 / 2**0.5 * product
    near(open_weights(second).read("weight", f"{name}.weight"), expected, 1e-6)
    assert find_checkpoint(tmp_path / "second") == second


# The base


def test_a_run_that_is_moved_finds_the_base_in_its_folder(tmp_path):
    tuned = save_tuned(tmp_path)
    shutil.copytree(tuned.base.parent, tmp_path / "run" / "start")
    inside = tmp_path / "run" / "start" / tuned.base.name
    checkpoint = save_factors(tmp_path / "run", tuned.run, inside, tuned.factors)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = tmp_path / "moved" / "checkpoints" / checkpoint.name
    assert base_of(moved) == Base.of(tmp_path / "moved" / "start" / tuned.base.name)
    assert base_of(tuned.checkpoint) == Base.of(tuned.base) and base_of(tuned.base) is None
    near(logits(megalite.load(moved)), logits(megalite.load(tuned.checkpoint)), 0)


@pytest.mark.parametrize("read", [find_checkpoint, open_weights, megalite.load])
def test_a_base_that_is_missing_or_another_one_is_refused(tmp_path, read):
    tuned = save_tuned(tmp_path)
    aside, fingerprint = tuned.base.with_name("aside"), Base.of(tuned.base).fingerprint
    tuned.base.rename(aside)
    remedy = r": put that checkpoint back, or start another run with output_dir=\.\.\.$"
    missing = f"holds adapters of {tuned.base}, whose manifest had sha256 {fingerprint} and is absent"
    with pytest.raises(CheckpointError, match=f"^[^\n]*{missing}[^\n]*{remedy}"):
        read(tuned.checkpoint)
    save_world(tuned.base.parent, 10, cut_all(tensors_of(tuned.llama), lambda name, full: Cut(None)))
    other = Base.of(tuned.base).fingerprint
    assert other != fingerprint
    with pytest.raises(CheckpointError, match=f"had sha256 {fingerprint} and has sha256 {other}{remedy}"):
        read(tuned.checkpoint)
    shutil.rmtree(tuned.base)
    aside.rename(tuned.base)
    assert read(tuned.checkpoint) is not None


def test_a_base_with_a_damaged_file_is_refused(tmp_path):
    tuned = save_tuned(tmp_path)
    file = tuned.base / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=f"{tuned.base} is not a valid checkpoint: {file.name} does not"
    ):
        find_checkpoint(tmp_path / "tuned")


def test_a_base_among_a_runs_own_checkpoints_is_kept(tmp_path):
    tuned = save_tuned(tmp_path)
    root = tmp_path / "run" / "checkpoints"
    shutil.copytree(tuned.base, root / "step-00000000")
    for step in (1, 2, 3):
        ranks = cut_all({("weight", "w"): torch.ones(1)}, lambda name, full: Cut(None))
        options = {"rank": 0, "world_size": 1, "gather": alone, "retention": Retention(last=1)}
        save_checkpoint(root, step, ranks[0], {"step": step}, {}, base=root / "step-00000000", **options)
    assert list_steps(root) == [0, 3]


def test_factors_that_do_not_fit_the_base_are_refused(tmp_path):
    tuned = save_tuned(tmp_path)
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    for factors in ({name: tuned.factors[name]}, tuned.factors | {name: torch.ones(3, 31)}):
        checkpoint = save_factors(tmp_path / str(len(factors)), tuned.run, tuned.base, factors)
        with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj has factors"):
            open_weights(checkpoint)


def test_a_checkpoint_of_adapters_has_nothing_of_its_base(tmp_path):
    tuned = save_tuned(tmp_path)
    names = {entry.name for entry in TensorReader(tuned.checkpoint).manifest.tensors}
    assert names == tuned.factors.keys()
    state = json.loads((tuned.checkpoint / "state.json").read_text())
    assert state["base"] == {"path": str(tuned.base), "manifest_sha256": Base.of(tuned.base).fingerprint}
