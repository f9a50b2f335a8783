"""From a megalite checkpoint to a Hugging Face Llama folder, and to a Llama in memory.

megalite's parameters carry Hugging Face's names, shapes and rotary layout, so there is nothing to rename, to
transpose or to permute. What is left is the casting, the cutting into shards, and a config.json that
transformers 4 and 5 both read right.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megalite.checkpoint.format import CONFIG, CheckpointError, Shape
from megalite.checkpoint.load import TensorReader
from megalite.checkpoint.tensor_file import Entry, sync_folder, write_tensor_file, write_text_file
from megalite.config.load import load_run
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from megalite.model.table import model_table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_config(checkpoint: Path) -> RunConfig:
    """The resolved configuration of the run that wrote the checkpoint."""
    return load_run(str(Path(checkpoint) / CONFIG))


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
    checkpoint: Path,
    output: Path,
    *,
    model: ModelConfig | None = None,
    dtype: str = "bfloat16",
    max_shard_bytes: int = 5_000_000_000,
    add_files: Callable[[Path], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads. Memory: one tensor.

    model:     default: as in the checkpoint's config.yaml.
    dtype:     "float32", "bfloat16" or "float16".
    add_files: called with the folder before it gets its final name, to put a tokenizer into it.
    progress:  called with the bytes of each tensor when it has been written.

    Raises CheckpointError when `output` exists and is not an empty folder, when the checkpoint does not hold
    exactly the tensors of `model`, or when a weight is too large for float16. Then `output` is not touched.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not an empty folder: remove it or name another")
    reader = TensorReader(checkpoint)
    model = model or read_config(checkpoint).model
    check_names(reader, model)
    config = hf_config(model, dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    aside.mkdir()
    try:
        entries = [
            Entry(name, shape, DTYPES[dtype], partial(_read_cast, reader, name, DTYPES[dtype], progress))
            for name, shape in _shapes_of(model).items()
        ]
        _write_shards(aside, entries, max_shard_bytes)
        _write_json(aside / "config.json", config)
        tokens = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(aside / "generation_config.json", {k: v for k, v in tokens.items() if v is not None})
        if add_files:
            add_files(aside)
        sync_folder(aside)
        aside.rename(output)
        sync_folder(output.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return output


def _shapes_of(model: ModelConfig) -> dict[str, Shape]:
    return {row.name: row.shape for row in model_table(model)}


def check_names(reader: TensorReader, model: ModelConfig) -> None:
    """Raise CheckpointError unless the checkpoint's weights are exactly those of the model."""
    expected, stored = _shapes_of(model), reader.manifest.shapes("weight")
    for name in [*expected, *stored]:
        if stored.get(name) != expected.get(name):
            there, here = (list(s[name]) if name in s else "absent" for s in (stored, expected))
            raise CheckpointError(
                f"weight {name} is {there} in {reader.checkpoint} and {here} in the model of its {CONFIG}"
            )


def _read_cast(
    reader: TensorReader, name: str, dtype: torch.dtype, progress: Callable[[int], object] | None = None
) -> torch.Tensor:
    full = reader.read("weight", name)
    cast = full.to(dtype)
    if (cast.isinf() & full.isfinite()).any():
        largest = full[full.isfinite()].abs().max()
        limit = torch.finfo(dtype).max
        raise CheckpointError(
            f"weight {name} reaches {largest:.4g}, {dtype} ends at {limit:.4g}: use float32"
        )
    if progress:
        progress(cast.nbytes)
    return cast


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


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text_file(path, json.dumps(value, indent=2) + "\n")


# Verification, and a Llama in memory


def largest_difference(checkpoint: Path, exported: Path, dtype: str) -> float:
    """Largest |exported - checkpoint| over all weights after the cast, read with the safetensors library.

    Raises CheckpointError unless both have the same tensors, in the same shape and in `dtype`.
    """
    reader, files = TensorReader(checkpoint), _exported_files(exported)
    different = files.keys() ^ reader.manifest.shapes("weight").keys()
    if different:
        raise CheckpointError(f"{min(different)} is only in one of {checkpoint} and {exported}")
    largest = torch.zeros((), dtype=torch.float64)
    for name, file in files.items():
        expected = _read_cast(reader, name, DTYPES[dtype])
        with safe_open(file, framework="pt") as source:
            actual = source.get_tensor(name)
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            raise CheckpointError(f"{exported} has {name} as {actual.dtype} {list(actual.shape)}")
        difference = (actual.double() - expected.double()).abs().max()
        largest = torch.maximum(largest, difference)  # keeps a NaN, unlike max()
    return largest.item()


def _exported_files(exported: Path) -> dict[str, Path]:
    """The file of every tensor, as the files themselves tell."""
    files: dict[str, Path] = {}
    for path in sorted(exported.glob("*.safetensors")):
        with safe_open(path, framework="pt") as source:
            files |= dict.fromkeys(source.keys(), path)
    return files


def build_transformers_model(checkpoint: Path, model: ModelConfig, dtype: str = "float32") -> Any:
    """A `transformers.LlamaForCausalLM` with the checkpoint's weights, without a file in between."""
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = TensorReader(checkpoint)
    check_names(reader, model)
    weights = {name: _read_cast(reader, name, DTYPES[dtype]) for name in _shapes_of(model)}
    config = LlamaConfig.from_dict(hf_config(model, dtype))
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=DTYPES[dtype])
