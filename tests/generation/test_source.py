"""Weights are read from wherever they lie as the models that transformers and PEFT make of them.

Tolerance: 1e-5 of the largest logit, as of a conversion: float32 numbers, added in another order.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.model import megalite_logits
from megalite.checkpoint.peft_folder import export_adapter
from megalite.generation.place import Place
from megalite.generation.source import Source, open_source
from megalite.tokenizer.load import build_byte_tokenizer
from tests.checkpoint.adapters import LORA, save_tuned, unmerged_stage
from tests.checkpoint.llamas import logits, random_llama, save_llama, tiny_run
from tests.checkpoint.test_peft_folder import save_by_peft
from tests.checkpoint.worlds import same_bits

HERE = Place(torch.device("cpu"))
TOKENS = torch.randint(257, (2, 48), generator=torch.Generator().manual_seed(1))


def opened(path: Path, base: Path | None = None) -> Source:
    return open_source(path, base, lambda line: None, HERE)


def our_logits(source: Source, dtype: str = "float32") -> torch.Tensor:
    return megalite_logits(source.load(dtype, HERE), TOKENS)


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize(
    "variant", ["plain", "tied", "qwen2", "qwen3", "llama3", "experts", "head norms and biases"]
)
def test_a_foreign_folder_is_read_as_transformers_reads_it(tmp_path, variant):
    llama = random_llama(tiny_run(variant).model)
    llama.save_pretrained(tmp_path / "one")
    llama.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    expected = logits(llama)
    for folder in ("one", "sharded"):
        source = opened(tmp_path / folder)
        assert_near(our_logits(source), expected)
        assert (source.tokenizer, source.chat_template) == (None, None)


def test_weights_are_rounded_as_they_are_read(tmp_path):
    """From half the bytes to the whole and back."""
    llama = random_llama(tiny_run().model).bfloat16()
    llama.save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        stage = opened(tmp_path).load(dtype, HERE)
        found = stage.layers["1"].mlp.down_proj.weight
        assert str(found.dtype) == f"torch.{dtype}"
        assert same_bits(found.detach().bfloat16(), llama.model.layers[1].mlp.down_proj.weight.detach())


@pytest.mark.parametrize("variant", ["plain", "qwen2", "experts"])
def test_our_adapter_s_folder_is_merged_into_its_base(tmp_path, variant):
    """The base is named by the adapter, or by hand: a checkpoint, or a folder of the same weights."""
    tuned = save_tuned(tmp_path, variant)
    export_adapter(tuned.checkpoint, tmp_path / "peft", "float32")
    tuned.llama.save_pretrained(tmp_path / "hf")
    expected = megalite_logits(unmerged_stage(tuned, tuned.factors), TOKENS)
    assert (logits(tuned.llama) - expected).abs().max() > 0.1  # the control: the adapter changes the model
    for base in (None, tmp_path / "base", tuned.base, tmp_path / "hf"):
        assert_near(our_logits(opened(tmp_path / "peft", base)), expected)
    assert_near(our_logits(opened(tmp_path / "tuned")), expected)


@pytest.mark.parametrize(
    ("variant", "targets"),
    [
        ("plain", {"target_modules": LORA.targets}),
        ("experts", {"target_modules": ["v_proj"], "target_parameters": ["shared_experts.up_proj.weight"]}),
    ],
)
def test_an_adapter_that_peft_saved_is_merged_as_peft_computes_it(tmp_path, variant, targets):
    llama = random_llama(tiny_run(variant).model)
    llama.save_pretrained(tmp_path / "hf")
    without = logits(llama)
    llama.name_or_path = str(tmp_path / "hf")  # which PEFT notes as the base
    model = save_by_peft(tmp_path / "peft", llama, r=3, lora_alpha=7, use_rslora=True, **targets)
    expected = logits(model)
    assert (without - expected).abs().max() > 0.1
    assert_near(our_logits(opened(tmp_path / "peft")), expected)


def test_a_tokenizer_beside_the_adapter_comes_before_the_base_s(tmp_path):
    tuned = save_tuned(tmp_path)
    export_adapter(tuned.checkpoint, tmp_path / "peft", "float32")
    assert opened(tmp_path / "peft").tokenizer == "bytes"
    build_byte_tokenizer().save(tmp_path / "peft")
    assert opened(tmp_path / "peft").tokenizer == str(tmp_path / "peft")


def test_a_run_says_its_tokenizer_and_template(tmp_path):
    run = tiny_run(train=["chats"], tokenizer="bytes", chat_template="plain")
    save_llama(tmp_path / "checkpoints", random_llama(run.model), run)
    source = opened(tmp_path)
    assert (source.tokenizer, source.chat_template) == ("bytes", "plain")


def test_what_does_not_belong_together_is_one_line(tmp_path):
    tuned = save_tuned(tmp_path)
    export_adapter(tuned.checkpoint, tmp_path / "peft", "float32")
    with pytest.raises(CheckpointError, match=r"^--base is x and .* leave --base out"):
        opened(tmp_path / "tuned", Path("x"))
    other = random_llama(tiny_run("experts").model)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"weight None in .*other: the adapter is of another"):
        our_logits(opened(tmp_path / "peft", tmp_path / "other"))
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tuned.base), "someone/their-model"))
    with pytest.raises(CheckpointError, match="an adapter of someone/their-model, which is no folder here"):
        opened(tmp_path / "peft")


def test_a_tensor_that_is_no_factor_of_the_rank_is_refused(tmp_path):
    tuned = save_tuned(tmp_path)
    export_adapter(tuned.checkpoint, tmp_path / "peft", "float32")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    whole = load_file(file)
    name = "base_model.model.model.layers.1.self_attn.q_proj"
    wrong = {"lora_A.weight": torch.zeros(4, 32), "bias": torch.zeros(3)}
    for key, tensor in wrong.items():
        save_file(whole | {f"{name}.{key}": tensor}, file)
        with pytest.raises(
            CheckpointError, match=rf"q_proj.{key} has shape .*, which is no factor of rank 3"
        ):
            our_logits(opened(tmp_path / "peft"))
