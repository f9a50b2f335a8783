"""From a megalite checkpoint to a Hugging Face Llama folder.

megalite's parameters carry Hugging Face's names, shapes and order of rotary pairs, so there is nothing to
rename, to transpose or to permute. What is left is the rounding, the cutting into shards, and a config.json
that transformers 4 and 5 both read right.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.tensor_file import Entry, write_tensor_file, write_text_file
from megalite.checkpoint.weights import DTYPES, Weights
from megalite.config.model import ModelConfig
from megalite.files import folder_aside

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def hf_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json in the spellings of transformers 4 and 5 at once.

    Both are needed: 4 reads `rope_theta`, `rope_scaling` and `torch_dtype`, and takes silent defaults without
    them; 5 writes and prefers `rope_parameters` and `dtype`. Special tokens are written even when there are
    none, because an absent one becomes 1 or 2.
    """
    if model.hidden_size % model.num_attention_heads:
        raise CheckpointError(
            f"hidden_size {model.hidden_size} is not divisible by num_attention_heads "
            f"{model.num_attention_heads}: transformers refuses such a model, it cannot be exported"
        )
    own = model.model_dump(exclude={"rope_scaling"})
    scaling = model.rope_scaling.model_dump(exclude_none=True) if model.rope_scaling else None
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **own,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "use_cache": True,
        "rope_parameters": {**(scaling or {"rope_type": "default"}), "rope_theta": model.rope_theta},
        "rope_scaling": scaling,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


# Export


def export(
    weights: Weights,
    output: Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    add_files: Callable[[Path], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads. Memory: one tensor.

    add_files: called with the folder before it gets its final name, to put a tokenizer into it.
    progress:  called with the bytes of each tensor when it is about to be written.

    Raises CheckpointError when `output` exists and is not an empty folder, when transformers refuses such a
    model, or when a weight is too large for float16. Then `output` is not touched.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not an empty folder: remove it or name another")
    config = hf_config(weights.model, weights.dtype)
    with folder_aside(output) as aside:
        _write_shards(aside, _entries(weights, progress), max_shard_bytes)
        _write_configs(aside, config)
        if add_files:
            add_files(aside)
    return output


def _entries(weights: Weights, progress: Callable[[int], object] | None) -> list[Entry]:
    def read(name: str) -> torch.Tensor:
        tensor = weights.read(name)
        if progress:
            progress(tensor.nbytes)
        return tensor

    dtype = DTYPES[weights.dtype]
    return [Entry(name, shape, dtype, partial(read, name)) for name, shape in weights.shapes.items()]


def _write_shards(folder: Path, entries: list[Entry], max_shard_bytes: int) -> None:
    """One file, or several and their index when the tensors do not fit into one."""
    shards = list(_shards(entries, max_shard_bytes))
    if len(shards) == 1:
        write_tensor_file(folder / WEIGHTS, shards[0], {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensor_file(folder / file, shard, {"format": "pt"})
        weight_map |= {entry.key: file for entry in shard}
    total = sum(entry.size_bytes for entry in entries)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(entries: list[Entry], max_bytes: int) -> Iterator[list[Entry]]:
    """Runs of entries of at most `max_bytes`; a larger tensor stands alone."""
    shard: list[Entry] = []
    for entry in entries:
        if shard and sum(e.size_bytes for e in shard) + entry.size_bytes > max_bytes:
            yield shard
            shard = []
        shard.append(entry)
    yield shard


def _write_configs(folder: Path, config: Mapping[str, Any]) -> None:
    _write_json(folder / "config.json", config)
    tokens = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {k: v for k, v in tokens.items() if v is not None})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text_file(path, json.dumps(value, indent=2) + "\n")
