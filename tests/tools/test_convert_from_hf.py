"""The command that turns a Hugging Face folder into a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from megalite.checkpoint import proof
from megalite.checkpoint.hf import export
from megalite.checkpoint.load import TensorReader, read_config, read_state
from megalite.checkpoint.weights import Weights
from megalite.tokenizer.load import build_byte_tokenizer
from tests.checkpoint.llamas import EXPERT_VARIANTS, VARIANTS, logits, random_llama, tensors_of, tiny_run
from tests.tools.room import room_for
from tools import convert_from_hf, generate

EVERY_VARIANT = VARIANTS | EXPERT_VARIANTS
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def save(folder: Path, variant: str = "plain", dtype: str = "float32", **options):
    """A folder as transformers itself writes it; the model."""
    llama = random_llama(tiny_run(variant).model).to(DTYPES[dtype])
    for name, buffer in llama.named_buffers():
        if name.endswith("e_score_correction_bias"):  # `to` rounded it, from_pretrained would not have
            buffer.data = torch.linspace(-0.2, 0.2, len(buffer)).flip(0)
    llama.save_pretrained(folder, **options)
    return llama


def run_tool(tmp_path, *extra: str) -> int:
    where = ["--model", str(tmp_path / "hf"), "--output", str(tmp_path / "run" / "checkpoints")]
    return convert_from_hf.main([*where, *extra])


def checkpoint_of(tmp_path) -> Path:
    return tmp_path / "run" / "checkpoints" / "step-00000000"


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_there_and_back_is_equal_bit_for_bit(tmp_path, capsys, variant):
    for dtype in DTYPES:
        where = tmp_path / dtype
        save(where / "hf", variant, dtype)
        assert run_tool(where) == 0
        assert capsys.readouterr().out.endswith("\nverified\n")
        model = read_config(checkpoint_of(where)).model
        there = tensors_in(where / "hf")
        back = tensors_in(export(Weights(checkpoint_of(where), model, dtype), where / "back"))
        assert there.keys() == back.keys()
        for name, tensor in there.items():
            assert tensor.dtype == back[name].dtype and tensor.equal(back[name]), name
        assert {tensor.dtype for name, tensor in there.items() if "correction_bias" not in name} == {
            DTYPES[dtype]
        }


def test_a_mistral_comes_in_and_goes_out_as_the_llama_that_it_is(tmp_path, capsys):
    model = tiny_run("plain").model
    fields = model.model_dump(exclude={"rope_scaling", "rope_theta"}) | {"sliding_window": 64, "head_dim": 16}
    torch.manual_seed(0)
    mistral = MistralForCausalLM(MistralConfig(**fields, rope_parameters=ROPE)).eval()
    mistral.save_pretrained(tmp_path / "hf")
    assert run_tool(tmp_path) == 0
    assert capsys.readouterr().out.endswith("\nverified\n")
    imported = read_config(checkpoint_of(tmp_path)).model
    export(Weights(checkpoint_of(tmp_path), imported), tmp_path / "back")
    there, back = tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "back")
    assert there.keys() == back.keys() and all(tensor.equal(back[name]) for name, tensor in there.items())
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert type(llama) is LlamaForCausalLM and logits(llama).equal(logits(mistral))


@pytest.mark.parametrize("variant", ["plain", "experts"])
def test_the_checkpoint_holds_the_weights_and_the_model_of_transformers(tmp_path, variant):
    llama = save(tmp_path / "hf", variant, max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert run_tool(tmp_path, "--no-verify") == 0
    reader, expected = TensorReader(checkpoint_of(tmp_path)), tensors_of(llama)
    assert {(entry.kind, entry.name) for entry in reader.manifest.tensors} == expected.keys()
    for (kind, name), tensor in expected.items():
        assert reader.read(kind, name).equal(tensor), name
    run, state = read_config(checkpoint_of(tmp_path)), read_state(checkpoint_of(tmp_path))
    assert run.model == tiny_run(variant).model.model_copy(update=transformers_tokens(llama))
    assert (run.data.tokenizer, run.output_dir) == (None, str(tmp_path / "run"))
    assert state["step"] == state["consumed_samples"] == state["optimizer_steps"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checkpoint_takes_no_more_room_than_the_folder(tmp_path, dtype):
    save(tmp_path / "hf", "experts", dtype)
    assert run_tool(tmp_path, "--no-verify") == 0
    stored = load_file(checkpoint_of(tmp_path) / "rank-00000.safetensors")
    there = tensors_in(tmp_path / "hf")
    assert sum(tensor.nbytes for tensor in stored.values()) == sum(tensor.nbytes for tensor in there.values())
    assert {tensor.dtype for tensor in stored.values()} == {DTYPES[dtype], torch.float32}  # the biases


def test_a_disk_without_room_is_one_line_and_leaves_nothing(tmp_path, capsys):
    save(tmp_path / "hf")
    with room_for(20_000):
        assert run_tool(tmp_path) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "step-00000000 was not saved" in lines[0] and "File too large" in lines[0]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def transformers_tokens(llama) -> dict:
    return {name: getattr(llama.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


@pytest.mark.parametrize("sharded", [False, True])
def test_older_bin_files_are_read(tmp_path, capsys, sharded):
    llama = save(tmp_path / "hf", "tied")
    (tmp_path / "hf" / "model.safetensors").unlink()
    state = {name: tensor.clone() for name, tensor in llama.state_dict().items()}  # with the tied head
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if sharded:
        names = sorted(state)
        files = {"a.bin": names[::2], "b.bin": names[1::2]}
        for file, part in files.items():
            torch.save({name: state[name] for name in part}, tmp_path / "hf" / file)
        index = {"weight_map": {name: file for file, part in files.items() for name in part}}
        (tmp_path / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    assert run_tool(tmp_path, "--no-verify") == 0
    reader = TensorReader(checkpoint_of(tmp_path))
    for (kind, name), tensor in tensors_of(llama).items():
        assert reader.read(kind, name).equal(tensor)


def test_a_bin_file_that_would_run_code_is_refused(tmp_path, capsys):
    save(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save({"a": Trap(tmp_path / "sprung")}, tmp_path / "hf" / "pytorch_model.bin")
    assert_refused(tmp_path, capsys, "pytorch_model.bin cannot be read: Weights only load failed")
    assert not (tmp_path / "sprung").exists()


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_the_folders_tokenizer_speaks_for_the_imported_model(tmp_path, capsys):
    save(tmp_path / "hf", "experts")
    build_byte_tokenizer().save(tmp_path / "hf", 64)
    assert run_tool(tmp_path, "--no-verify") == 0
    assert read_config(checkpoint_of(tmp_path)).data.tokenizer == str(tmp_path / "hf")
    arguments = ["--checkpoint", str(tmp_path / "run" / "checkpoints"), "--prompt", "def", "--device", "cpu"]
    assert generate.main([*arguments, "--max-new-tokens", "4"]) == 0


def test_a_comparison_that_does_not_fit_into_memory_is_left_out_unless_asked_for(
    tmp_path, capsys, monkeypatch
):
    class Full:
        available = 1000

    monkeypatch.setattr(proof.psutil, "virtual_memory", Full)
    save(tmp_path / "hf")
    assert run_tool(tmp_path) == 0
    captured = capsys.readouterr()
    assert "bytes of memory, 1,000 are free" in captured.err and "verified" not in captured.out
    assert run_tool(tmp_path, "--verify", "--output", str(tmp_path / "other")) == 0
    assert capsys.readouterr().out.endswith("\nverified\n")


def test_the_comparison_notices_another_model(tmp_path, capsys, monkeypatch):
    save(tmp_path / "hf", "experts")
    describe_run = convert_from_hf.describe_run

    def describe_wrong(folder, output):
        folder.model = folder.model.model_copy(update={"routed_scaling_factor": 1.0})
        return describe_run(folder, output)

    monkeypatch.setattr(convert_from_hf, "describe_run", describe_wrong)
    assert run_tool(tmp_path) == 1
    assert "does not agree with" in capsys.readouterr().err


# Refusals


def assert_refused(tmp_path, capsys, message: str) -> None:
    """In one line, with nothing written."""
    capsys.readouterr()
    assert run_tool(tmp_path) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and captured.out == ""
    assert not (tmp_path / "run").exists()


def change_config(tmp_path, change: dict) -> None:
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
REFUSED_CONFIGS = [
    ("plain", {"architectures": ["GemmaForCausalLM"]}, "is of architecture GemmaForCausalLM: only Llama"),
    ("plain", {"architectures": ["Qwen3ForCausalLM"]}, "has no model.layers.0.self_attn.q_norm.weight"),
    ("plain", {"architectures": ["Qwen2ForCausalLM"]}, "has no model.layers.0.self_attn.q_proj.bias"),
    ("biases", {"architectures": ["Qwen2ForCausalLM"]}, "which the model of its config.json does not have"),
    ("qwen3", {"architectures": ["LlamaForCausalLM"]}, "which the model of its config.json does not have"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 32}, "sliding_window is 32, max_posi"),
    ("plain", {"architectures": ...}, "is of architecture none"),
    ("plain", {"hidden_size": ...}, "has no hidden_size"),
    ("plain", {"hidden_act": "gelu"}, 'hidden_act is "gelu": expected one of \'silu\''),
    ("plain", {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 2.0}}, 'rope_type is "yarn"'),
    ("plain", {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}}, '"dynamic"'),
    ("experts", {"rope_parameters": ROPE}, "partial_rotary_factor is 0.5 and megalite computes 1 only"),
    ("experts", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5 and megalite computes 1 only"),
    ("experts", {"use_qk_norm": True}, "has no model.layers.0.self_attn.q_norm.weight"),
    ("experts", {"n_group": 2}, "n_group is 2 and megalite computes 1 only"),
    ("experts", {"attention_bias": True}, "has no model.layers.0.self_attn.q_proj.bias"),
    ("experts", {"n_routed_experts": 8}, "mlp.gate.weight has shape [6, 32], by config.json it is [8, 32]"),
    ("plain", {"intermediate_size": 64}, "gate_proj.weight has shape [48, 32], by config"),
    ("plain", {"num_hidden_layers": 1}, "which the model of its config.json does not have"),
    ("plain", {"num_hidden_layers": 3}, "has no model.layers.2.input_layernorm.weight"),
    ("plain", {"tie_word_embeddings": True}, "has a lm_head.weight of its own"),
    ("tied", {"tie_word_embeddings": False}, "has no lm_head.weight"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for variant in ("plain", "tied", "biases", "qwen3", "experts"):
        save(root / variant, variant)
    return root


@pytest.fixture
def copied(folders, tmp_path):
    def copy(variant: str) -> Path:
        (tmp_path / "hf").mkdir()
        for file in (folders / variant).iterdir():
            (tmp_path / "hf" / file.name).write_bytes(file.read_bytes())
        return tmp_path / "hf"

    return copy


@pytest.mark.parametrize(("variant", "change", "message"), REFUSED_CONFIGS)
def test_a_model_that_is_not_ours_is_refused(copied, tmp_path, capsys, variant, change, message):
    copied(variant)
    change_config(tmp_path, change)
    assert_refused(tmp_path, capsys, message)


def test_a_tensor_that_is_not_there_or_of_integers_is_refused(copied, tmp_path, capsys):
    file = copied("experts") / "model.safetensors"
    tensors = load_file(file)
    lost = tensors.pop("model.layers.2.mlp.experts.5.up_proj.weight")
    save_file(tensors, file)
    assert_refused(tmp_path, capsys, "has no model.layers.2.mlp.experts.5.up_proj.weight")
    save_file(tensors | {"model.layers.2.mlp.experts.5.up_proj.weight": lost.to(torch.int8)}, file)
    assert_refused(tmp_path, capsys, "experts.5.up_proj.weight is torch.int8, expected one of torch.float32")


def test_a_missing_or_damaged_file_is_refused(copied, tmp_path, capsys):
    folder = copied("plain")
    file, config = folder / "model.safetensors", (folder / "config.json").read_text()
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert_refused(tmp_path, capsys, "model.safetensors cannot be read: ")
    file.unlink()
    assert_refused(tmp_path, capsys, "has no weights: none of model.safetensors")
    torch.save({"a": torch.ones(10_000)}, folder / "pytorch_model.bin")
    cut = (folder / "pytorch_model.bin").read_bytes()[:-10_000]
    (folder / "pytorch_model.bin").write_bytes(cut)
    assert_refused(tmp_path, capsys, "pytorch_model.bin cannot be read: ")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}))
    assert_refused(
        tmp_path, capsys, "model-00002-of-00002.safetensors is missing, and model.safetensors.index"
    )
    index.write_text("[]")
    assert_refused(tmp_path, capsys, "index.json is not a JSON object")
    index.write_text("{}")
    assert_refused(tmp_path, capsys, "has no weight_map")
    (folder / "config.json").write_text(config[:-10])
    assert_refused(tmp_path, capsys, "config.json is not JSON")
    (folder / "config.json").unlink()
    assert_refused(tmp_path, capsys, "config.json is missing: name a folder of a Hugging Face model")


def test_an_output_with_checkpoints_is_refused(copied, tmp_path, capsys):
    copied("plain")
    assert run_tool(tmp_path, "--no-verify") == 0
    before = (checkpoint_of(tmp_path) / "manifest.json").read_bytes()
    assert run_tool(tmp_path) == 2
    assert "has checkpoints already: name another output" in capsys.readouterr().err
    assert (checkpoint_of(tmp_path) / "manifest.json").read_bytes() == before
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000000"]
