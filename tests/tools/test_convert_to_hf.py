"""The command that turns a checkpoint into a Hugging Face folder."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megalite.checkpoint.weights import Weights
from megalite.config.model import ModelConfig
from megalite.data.corpus import read_corpus
from megalite.tokenizer.load import build_byte_tokenizer, load_tokenizer
from tests.checkpoint.adapters import merged, save_tuned
from tests.checkpoint.llamas import EXPERT_VARIANTS, VARIANTS, logits, random_llama, save_llama, tiny_run
from tests.tools.room import room_for
from tools import convert_to_hf, train_tokenizer


def run_tool(tmp_path, *extra: str) -> int:
    where = ["--checkpoint", str(tmp_path / "checkpoints"), "--output", str(tmp_path / "hf")]
    return convert_to_hf.main([*where, *extra])


def save(tmp_path, variant="plain", step=10, **data):
    run = tiny_run(variant, **data)
    llama = random_llama(run.model)
    return llama, save_llama(tmp_path / "checkpoints", llama, run, step)


def test_the_folder_has_the_model_and_the_tokenizer_of_the_run(tmp_path, capsys):
    llama, checkpoint = save(tmp_path)
    assert run_tool(tmp_path, "--dtype", "float32", "--max-shard-size", "20KB") == 0
    out = capsys.readouterr().out
    assert f"wrote {sum(p.numel() for p in llama.parameters()):,} parameters of {checkpoint}" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert logits(model).equal(logits(llama))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("né")["input_ids"] == list("né".encode())
    assert model.config.eos_token_id == tokenizer.eos_token_id == 256
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2


def test_the_template_of_the_run_goes_into_the_export(tmp_path, capsys):
    """So that transformers frames messages as the model has learnt them."""
    save(tmp_path, train=["chats.jsonl"], tokenizer="bytes", chat_template="plain")
    assert run_tool(tmp_path, "--no-verify") == 0
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    framed = AutoTokenizer.from_pretrained(tmp_path / "hf").apply_chat_template(messages, tokenize=False)
    assert framed == "User:\na\nAssistant:\nb<|endoftext|>\n"
    capsys.readouterr()
    lost = tmp_path / "lost"
    run = tiny_run(train=["chats.jsonl"], tokenizer="bytes", chat_template=str(tmp_path / "gone.jinja"))
    save_llama(lost / "checkpoints", random_llama(run.model), run)
    assert run_tool(lost, "--no-verify") == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert line.startswith("warning: without the run's chat template: ") and "gone.jinja" in line
    assert AutoTokenizer.from_pretrained(lost / "hf").chat_template is None


@pytest.mark.parametrize(("variant", "warned"), [("qwen2", True), ("qwen3", False), ("plain", False)])
def test_a_tokenizer_that_transformers_replaces_by_its_own_is_told(tmp_path, capsys, variant, warned):
    """AutoTokenizer of transformers 5 cuts words as Qwen does for every Qwen2 model."""
    texts = [{"text": text} for _, text in read_corpus(max_bytes=50_000)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    mine = str(tmp_path / "mine")
    arguments = ["--input", str(tmp_path / "x.jsonl"), "--output", mine]
    assert train_tokenizer.main([*arguments, "--vocab-size", "400"]) == 0
    run = tiny_run("plain", train=["data/python"], tokenizer=mine)
    fields = {**run.model.model_dump(), **VARIANTS[variant], "vocab_size": 400}
    run = run.model_copy(update={"model": ModelConfig(**fields)})
    save_llama(tmp_path / "checkpoints", random_llama(run.model), run)
    capsys.readouterr()
    assert run_tool(tmp_path, "--no-verify") == 0
    warned = warned and not transformers.__version__.startswith("4.")
    assert ("as Qwen2Tokenizer, which gives" in capsys.readouterr().err) == warned
    named = PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")  # the remedy
    assert named(texts[0]["text"])["input_ids"] == load_tokenizer(mine).encode(texts[0]["text"])


@pytest.mark.parametrize("variant", VARIANTS | EXPERT_VARIANTS)
def test_verify_compares_transformers_with_megalites_own_model(tmp_path, capsys, variant):
    save(tmp_path, variant)
    assert run_tool(tmp_path, "--verify") == 0
    out = capsys.readouterr().out
    assert "largest difference of a weight after the cast: 0\n" in out
    assert "largest difference of a logit, transformers against megalite: " in out
    assert out.endswith("verified\n")


def test_verify_fails_when_the_model_reads_the_weights_differently(tmp_path, capsys, monkeypatch):
    """The control: the same weights under another rope base."""
    save(tmp_path)
    export = convert_to_hf.export

    def export_with_wrong_base(weights, *args, **kwargs):
        model = weights.model.model_copy(update={"rope_theta": 500.0})
        return export(Weights(weights.checkpoint, model, weights.dtype), *args, **kwargs)

    monkeypatch.setattr(convert_to_hf, "export", export_with_wrong_base)
    assert run_tool(tmp_path, "--verify") == 1
    captured = capsys.readouterr()
    assert "weight after the cast: 0\n" in captured.out
    assert "first differs after model.layers.0.self_attn, by " in captured.out
    assert "does not agree with" in captured.err and "verified\n" not in captured.out
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_verify_fails_when_a_weight_differs(tmp_path, capsys, monkeypatch):
    save(tmp_path)
    export = convert_to_hf.export

    def export_and_change(*args, **kwargs):
        file = export(*args, **kwargs) / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-5] ^= 0x40
        file.write_bytes(data)

    monkeypatch.setattr(convert_to_hf, "export", export_and_change)
    assert run_tool(tmp_path, "--verify") == 1


def test_the_newest_valid_checkpoint_is_taken_and_a_damaged_one_named(tmp_path, capsys):
    _, older = save(tmp_path, step=10)
    _, newer = save(tmp_path, step=20)
    (newer / "rank-00001.safetensors").unlink()
    assert run_tool(tmp_path) == 0
    captured = capsys.readouterr()
    assert "step-00000020 is not valid and is skipped: rank-00001.safetensors is missing" in captured.err
    assert str(older) in captured.out


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[-5] ^= 0x40
    file.write_bytes(data)


def test_a_checkpoint_whose_damage_shows_after_it_was_exported_gives_way_to_an_older_one(tmp_path, capsys):
    llama, older = save(tmp_path, step=10)
    save(tmp_path, step=20)
    flip_a_bit(tmp_path / "checkpoints" / "step-00000020" / "rank-00000.safetensors")
    with torch.no_grad():
        llama.model.norm.weight.fill_(0.125)  # so that it is seen whose weights were exported
    save_llama(tmp_path / "checkpoints", llama, tiny_run(), 10)
    assert run_tool(tmp_path, "--dtype", "float32") == 0
    captured = capsys.readouterr()
    assert captured.err.count("step-00000020 is not valid and is skipped: rank-00000.safetensors") == 1
    assert str(older) in captured.out and "step-00000020" not in captured.out
    exported = load_file(tmp_path / "hf" / "model.safetensors")["model.norm.weight"]
    assert exported.eq(0.125).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "hf"]


@pytest.mark.parametrize("where", ["checkpoints", "checkpoints/step-00000010"])
def test_a_damaged_checkpoint_alone_is_one_line_and_leaves_nothing(tmp_path, capsys, where):
    _, checkpoint = save(tmp_path)
    flip_a_bit(checkpoint / "rank-00001.safetensors")
    assert run_tool(tmp_path, "--checkpoint", str(tmp_path / where)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "rank-00001.safetensors does not match its sha256" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_disk_without_room_is_one_line_and_leaves_nothing(tmp_path, capsys):
    save(tmp_path)
    with room_for(20_000):
        assert run_tool(tmp_path) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "File too large" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_named_tokenizer_goes_into_the_export_and_none_leaves_it_out(tmp_path, capsys):
    save(tmp_path, train=["corpus"])
    build_byte_tokenizer().save(tmp_path / "tokenizer")
    assert run_tool(tmp_path) == 0
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    assert "without a tokenizer" in capsys.readouterr().err
    with_tokenizer = ["--output", str(tmp_path / "hf2"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert run_tool(tmp_path, *with_tokenizer) == 0
    assert json.loads((tmp_path / "hf2" / "tokenizer_config.json").read_text())["model_max_length"] == 64


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--output", "."], "exists and is not an empty folder"),
        (["--checkpoint", "absent"], "no checkpoint in absent: expected RUN_DIR/checkpoints"),
        (["--checkpoint", "absent/step-00000001"], "there is no checkpoint absent/step-00000001"),
        (["--tokenizer", "absent.json"], "absent.json: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys, extra, message):
    save(tmp_path)
    assert run_tool(tmp_path, *extra) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_numbers(tmp_path, capsys, monkeypatch):
    save(tmp_path)
    monkeypatch.setattr(convert_to_hf, "load_tokenizer", lambda name: Large())
    assert run_tool(tmp_path) == 2
    assert "has 300 ids and the model 257" in capsys.readouterr().err


class Large:
    vocab_size = 300


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("4096", 4096)]
)
def test_sizes_are_decimal_or_binary(text, size_bytes):
    assert convert_to_hf.parse_bytes(text) == size_bytes


@pytest.mark.parametrize("text", ["5 apples", "", "-1GB", "0"])
def test_a_size_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit) as stop:
        convert_to_hf.main(["--checkpoint", "c", "--output", "o", f"--max-shard-size={text}"])
    assert stop.value.code == 2
    assert "is not a size: write it like 500MB" in capsys.readouterr().err


def export_of_adapter(folder, *extra: str) -> int:
    where = ["--checkpoint", str(folder / "tuned"), "--output", str(folder / "out"), "--tokenizer", "bytes"]
    return convert_to_hf.main([*where, *extra])


def test_an_adapter_goes_out_merged_and_verified_or_alone(tmp_path, capsys):
    tuned = save_tuned(tmp_path)
    expected = merged(tuned)
    assert export_of_adapter(tmp_path, "--dtype", "float32", "--verify") == 0
    assert capsys.readouterr().out.endswith("verified\n")
    state = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(state[name].double(), expected["weight", name], rtol=0, atol=1e-6)
    assert not any("lora" in key for key in state)
    shutil.rmtree(tmp_path / "out")
    assert export_of_adapter(tmp_path, "--adapter") == 0
    numbers = sum(factor.numel() for factor in tuned.factors.values())
    told = f"wrote an adapter of {numbers:,} parameters of {tuned.checkpoint} to {tmp_path / 'out'}\n"
    assert capsys.readouterr().out == told
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(factors[f"base_model.model.{key}"].equal(factor) for key, factor in tuned.factors.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("né")["input_ids"] == list("né".encode())


def test_a_damaged_adapter_or_one_without_its_base_is_not_exported(tmp_path, capsys):
    tuned = save_tuned(tmp_path)
    file = tuned.checkpoint / "rank-00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert export_of_adapter(tmp_path, "--adapter") == 2
    assert "rank-00000.safetensors does not match its sha256" in capsys.readouterr().err
    file.write_bytes(whole)
    tuned.base.rename(tuned.base.with_name("aside"))
    for extra in (["--adapter"], []):
        assert export_of_adapter(tmp_path, *extra) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and "is absent (sha256 none): put that checkpoint back" in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_a_checkpoint_of_whole_weights_has_no_adapter_to_export(tmp_path, capsys):
    save(tmp_path)
    assert run_tool(tmp_path, "--adapter") == 2
    assert "holds whole weights and no adapter: export it without --adapter" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_tool(tmp_path, "--adapter", "--verify")
    assert "--verify compares whole models: leave out --adapter" in capsys.readouterr().err
