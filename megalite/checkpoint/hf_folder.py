"""A Hugging Face folder, read: its config.json, and its tensors where they lie."""

import json
import pickle
from collections import ChainMap
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.hf_config import model_config
from megalite.checkpoint.tensor_file import DTYPE_NAMES, TensorFile
from megalite.checkpoint.weights import Part
from megalite.config.model import ModelConfig

CONFIG_FILE = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# One file, or an index of several: in transformers' order of preference.
SOURCES = (WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROTARY_TABLE = ".rotary_emb.inv_freq"  # older Llamas carry it; it follows from the config


class HFFolder:
    """A model's folder in Hugging Face's format. Nothing in it is executed.

    Attributes:
        path: of the folder.
        config: its config.json.
        tensors: all of them by name; mapped files, which are read when an element is used. A tensor is mapped
            when it is asked for, so that what was read does not stay in memory longer than it is held.

    Raises CheckpointError when a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = _read_json(self.path / CONFIG_FILE)
        self.tensors: Mapping[str, torch.Tensor] = ChainMap(*map(_map_tensors, self._files()))

    @property
    def tokenizer(self) -> str | None:
        """The folder, as the name of the tokenizer in it, if there is one."""
        return tokenizer_in(self.path)

    @cached_property
    def model(self) -> ModelConfig:
        """What it describes. Raises CheckpointError for a model that megalite does not compute."""
        return model_config(self.config, str(self.path / CONFIG_FILE))

    def check(self, parts: Iterable[Part]) -> None:
        """Raise CheckpointError unless the folder holds these tensors, in their shapes, and no others.

        Left aside are tables of rotary frequencies, and a tied head that equals the embedding.
        """
        expected = {part.name: part.shape for part in parts}
        for name, shape in expected.items():
            self._check_tensor(name, shape)
        for name in self.tensors.keys() - expected.keys():
            if name == HEAD and not self.tensors[HEAD].equal(self.tensors[EMBEDDING]):
                raise CheckpointError(
                    f"{self.path} has a {HEAD} of its own, and its {CONFIG_FILE} tie_word_embeddings true: "
                    "say false there if the head is right"
                )
            if name != HEAD and not name.endswith(ROTARY_TABLE):
                raise CheckpointError(
                    f"{self.path} has {name}, which the model of its {CONFIG_FILE} does not have"
                )

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        tensor = self.tensors.get(name)
        if tensor is None:
            untied = ": say tie_word_embeddings true there if the embedding is the head" * (name == HEAD)
            raise CheckpointError(
                f"{self.path} has no {name}, which the model of its {CONFIG_FILE} has{untied}"
            )
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.path}: {name} has shape {list(tensor.shape)}, by {CONFIG_FILE} it is {list(shape)}"
            )
        if tensor.dtype not in DTYPE_NAMES:
            known = ", ".join(str(dtype) for dtype in DTYPE_NAMES)
            raise CheckpointError(f"{self.path}: {name} is {tensor.dtype}, expected one of {known}")

    def _files(self) -> list[Path]:
        source = next((self.path / name for name in SOURCES if (self.path / name).exists()), None)
        if source is None:
            raise CheckpointError(f"{self.path} has no weights: none of {', '.join(SOURCES)} is there")
        if source.suffix != ".json":
            return [source]
        weight_map = _read_json(source).get("weight_map")
        if not isinstance(weight_map, Mapping):
            raise CheckpointError(f"{source} has no weight_map: it is no index of weights")
        files = [self.path / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.exists():
                raise CheckpointError(f"{file} is missing, and {source.name} names it: get it again")
        return files


def tokenizer_in(folder: Path) -> str | None:
    """A folder, as the name of the tokenizer in it, if there is one."""
    return str(folder.resolve()) if any((folder / name).exists() for name in TOKENIZERS) else None


def _map_tensors(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return TensorFile(file)
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file} cannot be read: {reason}: get it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: name a folder of a Hugging Face model") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return values
