"""Exported folders give the same logits as the model whose weights the checkpoint holds."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megalite.checkpoint import load as load_module
from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.hf import export
from megalite.checkpoint.hf_folder import HFFolder
from megalite.checkpoint.load import read_config
from megalite.checkpoint.model import build_transformers_model
from megalite.checkpoint.verification import largest_difference, verify_export
from megalite.checkpoint.weights import DTYPES, Weights, model_parts
from megalite.model.table import buffer_table, model_table
from tests.checkpoint.llamas import (
    EXPERT_VARIANTS,
    VARIANTS,
    logits,
    random_llama,
    save_llama,
    tensors_of,
    tiny_run,
)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model


@pytest.mark.parametrize("variant", VARIANTS | EXPERT_VARIANTS)
def test_logits_of_the_export_equal_the_originals_exactly(tmp_path, variant):
    run = tiny_run(variant)
    original = random_llama(run.model)
    checkpoint = save_llama(tmp_path, original, run)
    expected = logits(original)
    loaded = load(export(Weights(checkpoint, run.model), tmp_path / "hf"))
    assert logits(loaded).equal(expected)
    assert logits(build_transformers_model(Weights(checkpoint, run.model))).equal(expected)
    own = read_config(checkpoint).model
    assert (own.tie_word_embeddings, own) == (run.model.tie_word_embeddings, run.model)


@pytest.mark.parametrize("variant", ["wide heads", "theta", "linear", "llama3"])
def test_another_config_gives_other_logits(tmp_path, variant):
    """The control: what the variant sets is seen in the logits, so the equality above is not empty."""
    run = tiny_run(variant)
    original = random_llama(run.model)
    exported = export(Weights(save_llama(tmp_path, original, run), run.model), tmp_path / "hf")
    changed = json.loads((exported / "config.json").read_text())
    if variant == "wide heads":
        changed |= {"num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 8}
    else:
        changed |= {"rope_theta": 10000.0, "rope_scaling": None, "rms_norm_eps": 1e-5}
        changed["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    (exported / "config.json").write_text(json.dumps(changed))
    assert (logits(load(exported)) - logits(original)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        {"v_proj": "k_proj"},
        {"o_proj": "transpose"},
        {"gate_proj": "up_proj"},
        {"q_proj": "permute"},
        {"input_layernorm": "post_attention_layernorm"},
    ],
    ids=str,
)
def test_a_wrong_converter_is_noticed(tmp_path, monkeypatch, wrong):
    run = tiny_run()
    original = random_llama(run.model)
    checkpoint = save_llama(tmp_path, original, run)
    read = Weights.read
    ((part, other),) = wrong.items()

    def read_wrong(weights, name):
        if part not in name:
            return read(weights, name)
        if other == "transpose":
            return read(weights, name).T.contiguous()
        if other == "permute":  # the order of Meta's own files: pairs (2j, 2j+1)
            return read(weights, name).view(4, 4, 2, 32).transpose(1, 2).reshape(32, 32)
        return read(weights, name.replace(part, other))

    monkeypatch.setattr(Weights, "read", read_wrong)
    exported = export(Weights(checkpoint, run.model), tmp_path / "hf")
    monkeypatch.undo()
    assert (logits(load(exported)) - logits(original)).abs().max() > 1e-3
    assert largest_difference(Weights(checkpoint, run.model), HFFolder(exported))[1] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once_to_the_asked_dtype(tmp_path, dtype):
    run = tiny_run()
    original = random_llama(run.model)
    checkpoint = save_llama(tmp_path, original, run)
    exported = export(Weights(checkpoint, run.model, dtype), tmp_path / "hf")
    loaded = load(exported, dtype=DTYPES[dtype]).state_dict()
    for name, weight in original.state_dict().items():
        assert loaded[name].equal(weight.to(DTYPES[dtype]))
    assert largest_difference(Weights(checkpoint, run.model, dtype), HFFolder(exported)) == (None, 0)
    with pytest.raises(CheckpointError, match="as torch"):
        verify_export(Weights(checkpoint, run.model), exported)


def test_shards_hold_every_tensor_once_and_stay_below_the_limit(tmp_path):
    run = tiny_run()
    original = random_llama(run.model)
    checkpoint = save_llama(tmp_path, original, run)
    exported = export(Weights(checkpoint, run.model), tmp_path / "hf", max_shard_bytes=20_000)
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert set(index["weight_map"]) == set(original.state_dict())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in original.state_dict().values())
    alone = {index["weight_map"][name] for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for file in set(files) - alone:  # those two are larger than a shard
        assert (exported / file).stat().st_size < 20_000 + 2_000
    assert logits(load(exported)).equal(logits(original))


@pytest.mark.parametrize("variant", VARIANTS | EXPERT_VARIANTS)
def test_the_table_and_the_export_hold_the_tensors_of_transformers(tmp_path, variant):
    run = tiny_run(variant)
    llama = random_llama(run.model)
    table = {("weight", row.name): row.shape for row in model_table(run.model)}
    table |= {("buffer", row.name): row.shape for row in buffer_table(run.model)}
    assert table == {key: tuple(tensor.shape) for key, tensor in tensors_of(llama).items()}
    exported = export(Weights(save_llama(tmp_path, llama, run), run.model), tmp_path / "hf")
    llama.save_pretrained(tmp_path / "theirs")
    ours, theirs = (header_of(folder / "model.safetensors") for folder in (exported, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name]["shape"], ours[name]["dtype"]) == (theirs[name]["shape"], theirs[name]["dtype"])
    assert list(ours) == [part.name for part in model_parts(run.model)]


def header_of(file: Path) -> dict[str, Any]:
    """name -> shape and dtype of every tensor in a safetensors file, in the order of the file."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    del header["__metadata__"]
    return header


def test_biases_stay_float32_and_lie_aligned_beside_narrow_weights(tmp_path):
    run = tiny_run("experts")
    llama = random_llama(run.model)
    weights = Weights(save_llama(tmp_path, llama, run), run.model, "bfloat16")
    header = header_of(export(weights, tmp_path / "hf") / "model.safetensors")
    assert weights.size_bytes == max(tensor["data_offsets"][1] for tensor in header.values())
    for kind, name in tensors_of(llama):
        if kind == "buffer":
            assert header[name]["dtype"] == "F32" and header[name]["data_offsets"][0] % 4 == 0
    kept = dict(load(tmp_path / "hf", torch.bfloat16).named_buffers())
    for name, buffer in llama.named_buffers():
        if name.endswith("e_score_correction_bias"):
            assert kept[name].equal(buffer) and buffer.any()


def test_one_expert_is_read_without_the_others(tmp_path, monkeypatch):
    run = tiny_run("experts")
    weights = Weights(save_llama(tmp_path, random_llama(run.model), run), run.model)
    overlaps, read = load_module.overlaps, []

    def counted(*regions):
        pairs = overlaps(*regions)
        read.extend(there.stop - there.start for there, _ in pairs)
        return pairs

    monkeypatch.setattr(load_module, "overlaps", counted)
    for part in weights.parts.values():
        read.clear()
        weights.read(part.name)
        # Where a flat range of the optimizer's ends within this expert, a row is read from both sides.
        assert math.prod(part.shape) <= sum(read) <= 1.1 * math.prod(part.shape)
    assert part.name.endswith("e_score_correction_bias")


def test_many_tensors_are_read_from_files_that_were_opened_once(tmp_path, monkeypatch):
    run = tiny_run("experts")
    checkpoint = save_llama(tmp_path, random_llama(run.model), run)
    opened: list[str] = []
    open_file = load_module.TensorFile

    def counted(path):
        opened.append(path.name)
        return open_file(path)

    monkeypatch.setattr(load_module, "TensorFile", counted)
    weights = Weights(checkpoint, run.model)
    for name in weights.parts:
        weights.read(name)
    assert len(opened) == 2 * 4 and len(set(opened)) == 4  # its table and its tensors, of each rank's file


def test_a_softmax_router_is_refused_before_anything_is_written(tmp_path):
    run = tiny_run("experts")
    checkpoint = save_llama(tmp_path / "checkpoints", random_llama(run.model), run)
    weights = Weights(checkpoint, run.model.model_copy(update={"scoring_func": "softmax"}))
    message = "scoring_func is softmax and Glm4MoeForCausalLM, the nearest class .* computes sigmoid only"
    for make in (lambda: export(weights, tmp_path / "hf"), lambda: build_transformers_model(weights)):
        with pytest.raises(CheckpointError, match=message):
            make()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_special_tokens_go_into_both_configs(tmp_path):
    run = tiny_run()
    checkpoint = save_llama(tmp_path, random_llama(run.model), run)
    model = run.model.model_copy(update={"eos_token_id": 256})
    exported = export(Weights(checkpoint, model), tmp_path / "hf")
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 256}
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == 256
    assert isinstance(load(exported), LlamaForCausalLM)


def test_an_existing_folder_is_not_overwritten_and_an_empty_one_is_filled(tmp_path):
    run = tiny_run()
    weights = Weights(save_llama(tmp_path, random_llama(run.model), run), run.model)
    full, empty = tmp_path / "full", tmp_path / "empty"
    full.mkdir(), empty.mkdir()
    (full / "precious").touch()
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        export(weights, full)
    assert [path.name for path in full.iterdir()] == ["precious"]
    assert (export(weights, empty) / "model.safetensors").exists()


def test_a_failed_export_leaves_nothing(tmp_path):
    run = tiny_run()
    original = random_llama(run.model)
    with torch.no_grad():
        original.lm_head.weight[3, 3] = 70000.0
    checkpoint = save_llama(tmp_path / "checkpoints", original, run)
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight reaches 7e\+04, torch.float16 ends at 6.55e\+04"
    ):
        export(Weights(checkpoint, run.model, "float16"), tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert export(Weights(checkpoint, run.model, "bfloat16"), tmp_path / "hf").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run = tiny_run()
    checkpoint = save_llama(tmp_path, random_llama(run.model), run)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"tie_word_embeddings": True}, "weight lm_head.weight is .* and absent in the model"),
        ({"num_hidden_layers": 3}, "weight model.layers.2.input_layernorm.weight is absent in"),
        ({"vocab_size": 256}, r"embed_tokens.weight is \[257, 32\] in .* and \[256, 32\] in the model"),
    ]
    for change, message in changes:
        with pytest.raises(CheckpointError, match=message):
            Weights(checkpoint, run.model.model_copy(update=change))
