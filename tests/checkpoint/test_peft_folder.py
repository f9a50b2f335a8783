"""Adapters in PEFT's format: PEFT computes with ours what we do, and we with PEFT's what it does.

Tolerance: 1e-5 of the largest logit, as of a conversion: float32 numbers, added in another order.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.model import megalite_logits
from megalite.checkpoint.peft_folder import PeftFolder, export_adapter
from megalite.config.tuning import LoraConfig
from tests.checkpoint.adapters import LORA, Tuned, save_factors, save_tuned, unmerged_stage
from tests.checkpoint.llamas import logits, random_llama, tiny_run
from tests.checkpoint.worlds import same_bits

TOKENS = torch.randint(257, (2, 48), generator=torch.Generator().manual_seed(1))
STABLE = LoraConfig(rank=2, alpha=2.5, rank_stabilized=True, targets=["v_proj", "down_proj"])
BESIDE_EXPERTS = ["mlp.down_proj.weight", "shared_experts.down_proj.weight"]
CASES = [("plain", LORA), ("qwen2", STABLE), ("biases", LORA), ("experts", LORA)]


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def adapted_layers(model: nn.Module) -> set[str]:
    """The layers that PEFT put an adapter beside."""
    prefix = "base_model.model."
    return {name.removeprefix(prefix) for name, module in model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize(("variant", "lora"), CASES)
def test_peft_computes_our_logits(tmp_path, variant, lora):
    tuned = save_tuned(tmp_path, variant, lora)
    expected = megalite_logits(unmerged_stage(tuned, tuned.factors), TOKENS)
    numbers = export_adapter(tuned.checkpoint, tmp_path / "peft", "float32")
    assert numbers == sum(factor.numel() for factor in tuned.factors.values())
    before = logits(tuned.llama)
    model = PeftModel.from_pretrained(tuned.llama, tmp_path / "peft")
    assert adapted_layers(model) == {name.rpartition(".lora_")[0] for name in tuned.factors}
    assert_near(logits(model), expected)
    assert (before - expected).abs().max() > 0.1  # the control: the adapter changes the model
    assert_near(logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize("variant", ["plain", "experts"])
def test_targets_are_names_that_older_transformers_does_not_match_with_experts(tmp_path, variant):
    """There each expert has linear layers, mlp.experts.3.gate_proj, which PEFT compares by their ends."""
    tuned = save_tuned(tmp_path, variant)
    export_adapter(tuned.checkpoint, tmp_path / "peft", "float32")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    targets = config["target_modules"] + [
        name.removesuffix(".weight") for name in config["target_parameters"] or []
    ]

    def is_matched(layer: str) -> bool:
        return any(layer.endswith(f".{target}") for target in targets)

    assert all(is_matched(name.rpartition(".lora_")[0]) for name in tuned.factors)
    if variant == "experts":
        assert "shared_experts.up_proj" in targets and not is_matched("model.layers.1.mlp.gate")
        assert not any(is_matched(f"model.layers.1.mlp.experts.3.{name}_proj") for name in ("up", "down"))
    else:
        assert targets == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_by_peft(folder: Path, llama: Any, **options: Any) -> Any:
    """An adapter that PEFT makes and saves, with random B; PEFT's model."""
    torch.manual_seed(3)
    config = PeftConfig(task_type="CAUSAL_LM", **options)
    model = get_peft_model(llama, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("variant", "theirs", "ours"),
    [
        ("plain", {"target_modules": LORA.targets, "lora_dropout": 0.1}, LORA),
        ("qwen2", {"target_modules": STABLE.targets}, STABLE),
        ("biases", {"target_modules": "model.*(v|down)_proj"}, STABLE),
        ("experts", {"target_modules": ["v_proj"], "target_parameters": BESIDE_EXPERTS}, STABLE),
    ],
)
def test_we_compute_the_logits_of_what_peft_saved(tmp_path, variant, theirs, ours):
    run = tiny_run(variant).model_copy(update={"lora": ours})
    llama, alpha = random_llama(run.model), ours.alpha
    options = {"r": ours.rank, "lora_alpha": alpha, "use_rslora": ours.rank_stabilized}
    model = save_by_peft(tmp_path / "peft", llama, **options, **theirs)
    folder = PeftFolder(tmp_path / "peft")
    folder.check(ours, run.model)
    expected = logits(model)
    tuned = Tuned(run, model.unload(), Path(), dict(folder.tensors), Path())
    assert_near(megalite_logits(unmerged_stage(tuned, tuned.factors), TOKENS), expected)
    assert (logits(tuned.llama) - expected).abs().max() > 0.1


def test_what_goes_out_comes_in_bit_for_bit(tmp_path):
    tuned = save_tuned(tmp_path)
    for dtype in ("float32", "bfloat16"):
        export_adapter(tuned.checkpoint, tmp_path / dtype, dtype)
        folder = PeftFolder(tmp_path / dtype)
        folder.check(LORA, tuned.run.model)
        assert folder.lora.model_copy(update={"targets": LORA.targets}) == LORA
        assert folder.tensors.keys() == tuned.factors.keys()
        for name, factor in tuned.factors.items():
            rounded = factor.to(getattr(torch, dtype))
            assert folder.tensors[name].dtype == rounded.dtype
            assert same_bits(folder.tensors[name].float(), rounded.float())


def test_the_base_is_named_by_the_folder_that_it_was_imported_from(tmp_path):
    tuned = save_tuned(tmp_path)

    def named(output: str) -> str:
        export_adapter(tuned.checkpoint, tmp_path / output, "float32")
        config = json.loads((tmp_path / output / "adapter_config.json").read_text())
        return config["base_model_name_or_path"]

    assert named("first") == str(tuned.base)


def test_nothing_is_written_where_an_export_is_refused(tmp_path):
    tuned = save_tuned(tmp_path)
    with pytest.raises(CheckpointError, match="holds whole weights and no adapter: export it without --ada"):
        export_adapter(tuned.base, tmp_path / "peft", "float32")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        export_adapter(tuned.checkpoint, tmp_path / "full", "float32")
    tuned.factors["model.layers.0.mlp.up_proj.lora_B.weight"][0, 0] = 1e6
    huge = save_factors(tmp_path / "huge", tuned.run, tuned.base, tuned.factors)
    with pytest.raises(
        CheckpointError, match=r"up_proj.lora_B.weight reaches 1e\+06, beyond torch.float16: u"
    ):
        export_adapter(huge, tmp_path / "peft", "float16")
    assert not (tmp_path / "peft").exists() and not list(tmp_path.glob(".*"))


# What is refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An adapter of ours, to be changed in copies."""
    root = tmp_path_factory.mktemp("peft")
    export_adapter(save_tuned(root).checkpoint, root / "peft", "float32")
    return root / "peft"


def changed(folder: Path, where: Path, config: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
    """A copy with other values; None takes a tensor out."""
    where.mkdir()
    before = json.loads((folder / "adapter_config.json").read_text())
    (where / "adapter_config.json").write_text(json.dumps(before | config))
    state = load_file(folder / "adapter_model.safetensors") | (tensors or {})
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(state, where / "adapter_model.safetensors")
    return where


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "has use_dora true, which megalite does not compute: merge"),
        ({"bias": "all"}, 'has bias "all", which'),
        ({"lora_bias": True}, "has lora_bias true, which"),
        ({"modules_to_save": ["lm_head"]}, r'has modules_to_save \["lm_head"\], which'),
        ({"rank_pattern": {"q_proj": 9}}, r'has rank_pattern {"q_proj": 9}, which'),
        ({"alpha_pattern": {"q_proj": 9}}, "has alpha_pattern"),
        ({"fan_in_fan_out": True}, "has fan_in_fan_out"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "has target_parameters"),
        ({"init_lora_weights": "pissa"}, 'has init_lora_weights "pissa", which'),
        ({"an_option_to_come": 3}, "has an_option_to_come 3, which"),
        ({"peft_type": "IA3"}, "has peft_type 'IA3', expected 'LORA'"),
        ({"r": 0.5}, "is not of LoRA: "),
        ({"r": 4}, r"lora.rank is 4 in .* and 3 in this run: say lora.rank=4, or"),
        ({"lora_alpha": 8}, r"lora.alpha is 8.0 in .* and 7.0 in this run: say lora.alpha=8.0, or"),
        ({"use_rslora": True}, r"lora.rank_stabilized is True in .* and False in this run"),
    ],
)
def test_what_we_do_not_compute_is_refused_by_name(folder, tmp_path, config, message):
    with pytest.raises(CheckpointError, match=f"^[^\n]*{message}[^\n]*$"):
        PeftFolder(changed(folder, tmp_path / "changed", config)).check(LORA, tiny_run().model)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({KEY: None}, "q_proj.lora_A.weight is absent, in this run it is [3, 32]"),
        ({KEY: torch.ones(3, 31)}, "q_proj.lora_A.weight is [3, 31], in this run it is [3, 32]"),
        ({KEY: torch.ones(3, 32).double()}, "q_proj.lora_A.weight is torch.float64, expected one of float32"),
        ({"base_model.model.lm_head.weight": torch.ones(1)}, "lm_head.weight is [1], in this run it is abs"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, tmp_path, tensors, message):
    with pytest.raises(CheckpointError) as caught:
        PeftFolder(changed(folder, tmp_path / "changed", {}, tensors)).check(LORA, tiny_run().model)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_other_targets_are_refused_with_both(folder):
    ours = LORA.model_copy(update={"targets": ["q_proj", "v_proj"]})
    with pytest.raises(CheckpointError, match=r"targets is \[down_proj,gate_proj,.*and \[q_proj,v_proj\] in"):
        PeftFolder(folder).check(ours, tiny_run().model)


def test_files_that_are_missing_or_damaged_are_refused(folder, tmp_path):
    copy = changed(folder, tmp_path / "changed", {})
    weights, config = copy / "adapter_model.safetensors", copy / "adapter_config.json"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors cannot be read"):
        PeftFolder(copy)
    weights.unlink()
    with pytest.raises(CheckpointError, match="is missing: save the adapter as safetensors, not as a pickle"):
        PeftFolder(copy)
    config.write_text("[]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        PeftFolder(copy)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        PeftFolder(copy)
    config.unlink()
    with pytest.raises(CheckpointError, match="is missing: name a folder of an adapter of PEFT"):
        PeftFolder(copy)
