"""From a megalite checkpoint to a Hugging Face folder, and back.

megalite's parameters carry Hugging Face's names, shapes and order of rotary pairs, so there is nothing to
rename, to transpose or to permute. What is left is to take stacks of experts apart, to round and to cut into
shards; the way back is a checkpoint whose pieces are the folder's tensors.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.agreement import alone
from megalite.checkpoint.format import CONFIG, CheckpointError, Piece, list_steps
from megalite.checkpoint.hf_config import hf_config
from megalite.checkpoint.hf_folder import CONFIG_FILE, INDEX, WEIGHTS, HFFolder
from megalite.checkpoint.save import save_checkpoint
from megalite.checkpoint.tensor_file import Entry, write_plain_tensor_file, write_text_file
from megalite.checkpoint.vacancy import require_vacant
from megalite.checkpoint.weights import Part, Weights, model_parts
from megalite.config.load import dump_run
from megalite.config.run import RunConfig
from megalite.files import folder_aside

IMPORTED_FROM = "imported_from"  # in state.json: the Hugging Face folder

# Export


def export(
    weights: Weights,
    output: Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    add_files: Callable[[Path], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Memory: two tensors, of a stack two entries, and blocks of 100 MB.

    add_files: called with the folder before it gets its final name, to put a tokenizer into it.
    progress:  called with the bytes of each tensor when it is about to be written.

    Raises CheckpointError when `output` exists and is not an empty folder, when transformers has no class
    for such a model, or when a weight is too large for float16. Then `output` is not touched.
    """
    output = Path(output)
    require_vacant(output)
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

    return [
        Entry(name, part.shape, weights.dtype_of(name), partial(read, name))
        for name, part in weights.parts.items()
    ]


def _write_shards(folder: Path, entries: list[Entry], max_shard_bytes: int) -> None:
    """One file, or several and their index when the tensors do not fit into one."""
    shards = list(_shards(entries, max_shard_bytes))
    if len(shards) == 1:
        write_plain_tensor_file(folder / WEIGHTS, shards[0], {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_plain_tensor_file(folder / file, shard, {"format": "pt"})
        weight_map |= {entry.key: file for entry in shard}
    total = sum(entry.size_bytes for entry in entries)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(entries: list[Entry], max_bytes: int) -> Iterator[list[Entry]]:
    """Runs of entries of at most `max_bytes`; a larger tensor stands alone."""
    shard: list[Entry] = []
    size_bytes = 0
    for entry in entries:
        if shard and size_bytes + entry.size_bytes > max_bytes:
            yield shard
            shard, size_bytes = [], 0
        shard.append(entry)
        size_bytes += entry.size_bytes
    yield shard


def _write_configs(folder: Path, config: Mapping[str, Any]) -> None:
    _write_json(folder / CONFIG_FILE, config)
    tokens = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {k: v for k, v in tokens.items() if v is not None})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text_file(path, json.dumps(value, indent=2) + "\n")


# Import


def import_folder(folder: HFFolder, root: Path, run: RunConfig) -> Path:
    """Write the checkpoint of step 0 under `root`: weights and routers' biases, nothing of an optimizer.

    run: goes into it; its model is the folder's. Memory: 0.5 GB.

    Raises CheckpointError when there are checkpoints already or the folder does not hold the model's tensors.
    """
    if list_steps(root):
        raise CheckpointError(f"{root} has checkpoints already: name another output, or move them away")
    parts = list(model_parts(run.model))
    folder.check(parts)
    pieces = [_piece(part, folder) for part in parts]
    state: dict[str, Any] = {"step": 0, "consumed_samples": 0, "consumed_tokens": 0, "optimizer_steps": 0}
    state |= {IMPORTED_FROM: str(folder.path.resolve())}
    files = {CONFIG: dump_run(run)}
    return save_checkpoint(root, 0, pieces, state, files, rank=0, world_size=1, gather=alone)


def _piece(part: Part, folder: HFFolder) -> Piece:
    def read() -> torch.Tensor:
        return folder.tensors[part.name].reshape(-1)

    size_and_dtype = torch.empty_like(read(), device="meta")
    return Piece(part.tensor, part.kind, part.full_shape, *part.box, 0, size_and_dtype, read=read)
