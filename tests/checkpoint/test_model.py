"""A checkpoint's model in the memory of one process, as a user of the library gets it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megalite
from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.hf import export, import_folder
from megalite.checkpoint.hf_folder import HFFolder
from megalite.checkpoint.model import load_stage
from megalite.checkpoint.weights import Weights
from megalite.parallel.plan import LayerPlan
from tests.checkpoint.llamas import logits, random_llama, save_llama, tiny_run


def save(tmp_path, variant="plain"):
    run = tiny_run(variant)
    llama = random_llama(run.model)
    return llama, save_llama(tmp_path / "checkpoints", llama, run)


@pytest.mark.parametrize(
    ("variant", "kind"), [("plain", "LlamaForCausalLM"), ("experts", "Glm4MoeForCausalLM")]
)
def test_load_gives_transformers_model_with_the_weights_of_the_checkpoint(tmp_path, variant, kind):
    llama, step = save(tmp_path, variant)
    for path in (tmp_path, str(tmp_path / "checkpoints"), step):
        model = megalite.load(path)
        assert type(model).__name__ == kind and not model.training
        assert logits(model).equal(logits(llama))
    tokens = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert model.generate(tokens, **options).equal(llama.generate(tokens, **options))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_load_rounds_to_the_dtype_that_it_is_asked_for(tmp_path, dtype):
    llama, _ = save(tmp_path)
    model = megalite.load(tmp_path, dtype=dtype, device="cpu")
    assert model.lm_head.weight.equal(llama.lm_head.weight.bfloat16())


def test_a_loaded_model_does_not_lie_in_the_checkpoints_files(tmp_path):
    """They may be removed, or lie on a network, while the model is in use."""
    run = tiny_run()
    llama = random_llama(run.model)
    checkpoint = save_llama(tmp_path / "checkpoints", llama, run)
    imported = import_folder(
        HFFolder(export(Weights(checkpoint, run.model), tmp_path / "hf")), tmp_path / "b", run
    )
    mapped = Weights(imported, run.model).read("model.norm.weight")
    assert str(imported) in Path("/proc/self/maps").read_text() and mapped.any()
    model = megalite.load(imported)
    del mapped
    assert str(imported) not in Path("/proc/self/maps").read_text()
    assert logits(model).equal(logits(llama))


def test_load_refuses_a_dtype_that_it_does_not_know_and_a_path_without_a_checkpoint(tmp_path):
    save(tmp_path)
    with pytest.raises(CheckpointError, match="dtype int8 is not one of float32, bfloat16, float16"):
        megalite.load(tmp_path, dtype="int8")
    with pytest.raises(CheckpointError, match="no checkpoint in absent: expected RUN_DIR/checkpoints"):
        megalite.load("absent")


def test_load_warns_of_a_damaged_checkpoint_that_it_skips(tmp_path):
    llama, _ = save(tmp_path)
    newer = save_llama(tmp_path / "checkpoints", llama, tiny_run(), step=20)
    (newer / "state.json").unlink()
    with pytest.warns(UserWarning, match="step-00000020 is not valid and is skipped"):
        megalite.load(tmp_path)


def test_importing_megalite_imports_neither_torch_nor_transformers():
    code = "import sys, megalite; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_a_stage_refuses_a_dtype_that_a_weight_reaches_beyond(tmp_path):
    run = tiny_run()
    llama = random_llama(run.model)
    with torch.no_grad():
        llama.lm_head.weight[3, 3] = 1e6
    step = save_llama(tmp_path, llama, run)
    with pytest.raises(CheckpointError, match=r"weight lm_head.weight reaches beyond torch.float16: use flo"):
        load_stage(step, run.model, LayerPlan(dtype=torch.float16))
    load_stage(step, run.model, LayerPlan(dtype=torch.bfloat16))
