"""The same step in picotron, from a checkout that PICOTRON names: it is no package, and written for CUDA."""

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.peers import Step, adamw, token_loss
from megalite.batch import Batch
from megalite.checkpoint.hf_config import hf_config
from megalite.config.run import RunConfig

VARIABLE = "PICOTRON"  # of the environment: the folder that holds its train.py
FACTS = {"FLASH_ATTEN": "0", "DTYPE": "float32", "DEVICE": "cpu", "CONTEXT_PARALLEL": "0"}  # read by picotron
CUDA_ONLY = {  # imported by its model, and not called where FLASH_ATTEN is 0
    "flash_attn.flash_attn_interface": "flash_attn_func",
    "flash_attn.layers.rotary": "apply_rotary_emb",
    "flash_attn.ops.triton.layer_norm": "layer_norm_fn",
}


def checkout() -> Path | None:
    """Where picotron is; None if nobody says.

    Raises:
        SystemExit: it is not there.
    """
    if not os.environ.get(VARIABLE):
        return None
    folder = Path(os.environ[VARIABLE])
    if not (folder / "picotron" / "model.py").is_file():
        raise SystemExit(f"error: {VARIABLE}={folder} holds no picotron/model.py: name the checkout's folder")
    return folder


def picotron_step(run: RunConfig, batches: Sequence[Batch], tp_size: int, pp_size: int) -> Step:
    """With 1F1B in a pipeline; AdamW fused, and no clipping, which it has not."""
    _make_importable()
    load = importlib.import_module
    load("picotron.process_group_manager").setup_process_group_manager(tp_size, 1, pp_size, 1)
    shape = SimpleNamespace(**hf_config(run.model, "float32"))
    shape.max_position_embeddings, shape.rope_theta = run.data.seq_length, run.model.rope_theta
    model = load("picotron.model").Llama(shape)
    if tp_size > 1:
        model = load("picotron.tensor_parallel.tensor_parallel").apply_tensor_parallel(model)
    pipeline = load("picotron.pipeline_parallel.pipeline_parallel")
    model = pipeline.PipelineParallel(model, shape) if pp_size > 1 else model
    optimizer = adamw(model, run.optimizer)
    assert batches[0].input_ids is not None
    tensor_shape = (*batches[0].input_ids.shape, run.model.hidden_size)

    def step() -> float:
        if pp_size == 1:
            loss = _accumulate(model, batches)
        else:
            with mock.patch.object(torch.cuda, "synchronize"):  # it waits for a GPU after each transfer
                device, dtype = torch.device("cpu"), torch.float32
                loss = pipeline.train_step_pipeline_1f1b(model, Loader(batches), tensor_shape, device, dtype)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


class Loader:
    """Micro batches as its pipeline asks for them."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.grad_acc_steps = len(batches)
        self._batches: Iterator[Batch] = iter(batches)

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        unread = batch.labels  # asked for, and not used by its layers
        return {"input_ids": batch.input_ids, "target_ids": batch.labels, "position_ids": unread}


def _accumulate(model: nn.Module, batches: Sequence[Batch]) -> float:
    total = 0.0
    for batch in batches:
        loss = token_loss(model(batch.input_ids), batch) / len(batches)
        loss.backward()
        total += loss.item()
    return total


def _make_importable() -> None:
    folder = checkout()
    assert folder is not None
    sys.path.append(str(folder))
    os.environ |= {**FACTS, "LOCAL_RANK": str(dist.get_rank())}
    for name, function in CUDA_ONLY.items():
        module: Any = ModuleType(name)
        setattr(module, function, None)
        sys.modules[name] = module
