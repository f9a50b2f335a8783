"""Adapters in the format of PEFT, written and read: adapter_config.json and adapter_model.safetensors.

PEFT names a factor after the Hugging Face layer that it stands beside, and ours has that name already:
base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight [r, in] and .lora_B.weight [out, r].
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError

from megalite.checkpoint.adapter import WEIGHT, check_same_adapter
from megalite.checkpoint.base import Base, base_of
from megalite.checkpoint.format import CheckpointError, Shape
from megalite.checkpoint.hf import IMPORTED_FROM
from megalite.checkpoint.load import TensorReader, read_config, read_state
from megalite.checkpoint.tensor_file import (
    DTYPE_NAMES,
    Entry,
    TensorFile,
    hash_file,
    write_plain_tensor_file,
    write_text_file,
)
from megalite.checkpoint.vacancy import require_vacant
from megalite.checkpoint.weights import DTYPES
from megalite.config.model import ModelConfig
from megalite.config.tuning import LoraConfig
from megalite.files import folder_aside
from megalite.model.table import adapter_table
from megalite.parallel.lora import LORA_A

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ATTENTION = "self_attn"  # the parent of layers that no expert has
# Keys that say what we read, and keys without a part in what a trained adapter computes.
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "target_parameters"}
ASIDE = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
ASIDE |= {"lora_dropout", "exclude_modules", "layers_pattern", "layers_to_transform", "megatron_core"}
ASIDE |= {"qalora_group_size", "eva_config", "ensure_weight_tying"}
LINEAR_WEIGHT = "_proj.weight"  # ends the names of weights of linear layers
# Draws of A that leave the base as it is; others, such as "pissa", change it.
HARMLESS_DRAWS = (None, True, False, "gaussian", "orthogonal", "eva")

# Out


def export_adapter(
    checkpoint: Path, output: Path, dtype: str, *, add_files: Callable[[Path], object] | None = None
) -> int:
    """Write a folder that `PeftModel.from_pretrained` loads; how many numbers it holds.

    dtype: to round to: a key of DTYPES.
    add_files: called with the folder before it gets its final name, to put a tokenizer into it.

    Raises CheckpointError when `output` exists and is not an empty folder, when the checkpoint is not one of
    adapters, or when a factor is too large for float16. Then `output` is not touched.
    """
    output = Path(output)
    require_vacant(output)
    base = base_of(checkpoint)
    if base is None:
        raise CheckpointError(f"{checkpoint} holds whole weights and no adapter: export it without --adapter")
    base.check(checkpoint)
    run, reader = read_config(checkpoint), TensorReader(checkpoint)
    shapes = reader.manifest.shapes(WEIGHT)
    entries = [
        Entry(PREFIX + name, shape, DTYPES[dtype], partial(_read_rounded, reader, name, DTYPES[dtype]))
        for name, shape in shapes.items()
    ]
    config = adapter_config(run.lora, run.model, _name_of(base))
    with folder_aside(output) as aside:
        write_plain_tensor_file(aside / ADAPTER_WEIGHTS, entries, {"format": "pt"})
        write_text_file(aside / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")
        if add_files:
            add_files(aside)
    return sum(entry.size_bytes // entry.dtype.itemsize for entry in entries)


def adapter_config(lora: LoraConfig, model: ModelConfig, base: str) -> dict[str, Any]:
    """PEFT's adapter_config.json. base: name or folder of the model that the adapters belong to."""
    modules, parameters = _targets(lora, model)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rank_stabilized,
        "target_modules": modules,
        "target_parameters": parameters or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _targets(lora: LoraConfig, model: ModelConfig) -> tuple[list[str], list[str]]:
    """Ends of the names of layers, and of weights: PEFT's target_modules and target_parameters.

    Beside experts, gate_proj, up_proj and down_proj are named with their parents, which no expert has, and as
    weights, since PEFT takes any target_modules of these names for all experts of a layer.
    """
    layers = [layer.split(".") for layer in _adapted_layers(lora, model)]
    if not model.n_routed_experts:
        return list(dict.fromkeys(parts[-1] for parts in layers)), []
    ends = dict.fromkeys((parts[-2], ".".join(parts[-2:])) for parts in layers)
    modules = [end for parent, end in ends if parent == ATTENTION]
    return modules, [f"{end}.{WEIGHT}" for parent, end in ends if parent != ATTENTION]


def _adapted_layers(lora: LoraConfig, model: ModelConfig) -> list[str]:
    names = (row.name for row in adapter_table(model, lora.rank, lora.targets))
    return [name.removesuffix(f".{LORA_A}") for name in names if name.endswith(LORA_A)]


def _name_of(base: Base) -> str:
    """The Hugging Face folder that a base was imported from, else its own."""
    return read_state(base.folder).get(IMPORTED_FROM) or str(base.folder)


def _read_rounded(reader: TensorReader, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Raises CheckpointError where rounding made a finite number infinite."""
    full = reader.read(WEIGHT, name)
    rounded = full.to(dtype)
    if rounded.isinf().sum() > full.isinf().sum():
        raise CheckpointError(f"weight {name} reaches {full.abs().max():.4g}, beyond {dtype}: use float32")
    return rounded


# In


class PeftFolder:
    """An adapter's folder in PEFT's format. Nothing in it is executed.

    Attributes:
        path: of the folder.
        base: name or folder of the model that it belongs to, if it says one.
        lora: what it says, with the targets of its tensors.
        tensors: its factors by our names, mapped.

    Raises CheckpointError when a file is missing or damaged, or for an option that megalite does not compute.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        config = self._read_config()
        _check_options(config, self.path / ADAPTER_CONFIG)
        self.base: str | None = config.get("base_model_name_or_path")
        self.tensors = self._map_tensors()
        targets = {name.removesuffix(f".{LORA_A}").split(".")[-1] for name in self.tensors if LORA_A in name}
        try:
            self.lora = LoraConfig(
                rank=config["r"],
                alpha=config["lora_alpha"],
                rank_stabilized=config.get("use_rslora", False),
                targets=sorted(targets),
            )
        except (KeyError, ValidationError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error.errors()[0]["msg"]
            raise CheckpointError(f"{self.path / ADAPTER_CONFIG} is not of LoRA: {reason}") from None

    @property
    def fingerprint(self) -> str:
        """The sha256 of its weights."""
        return hash_file(self.path / ADAPTER_WEIGHTS)

    def check(self, lora: LoraConfig, model: ModelConfig) -> None:
        """Raise CheckpointError unless it is an adapter as `lora` describes it, of the layers of `model`."""
        layers = {layer.split(".")[-1] for layer in _adapted_layers(lora, model)}
        check_same_adapter(self.lora, lora.model_copy(update={"targets": sorted(layers)}), str(self.path))
        expected = {row.name: row.shape for row in adapter_table(model, lora.rank, lora.targets)}
        for name in sorted(expected.keys() | self.tensors.keys()):
            found = tuple(self.tensors[name].shape) if name in self.tensors else None
            if found != expected.get(name):
                raise CheckpointError(
                    f"{self.path}: {name} is {_shape(found)}, in this run it is {_shape(expected.get(name))}"
                )
            if self.tensors[name].dtype not in DTYPE_NAMES:
                known = ", ".join(DTYPES)
                raise CheckpointError(
                    f"{self.path}: {name} is {self.tensors[name].dtype}, expected one of {known}"
                )

    def _read_config(self) -> dict[str, Any]:
        path = self.path / ADAPTER_CONFIG
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: name a folder of an adapter of PEFT") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} is not a JSON object")
        return config

    def _map_tensors(self) -> dict[str, torch.Tensor]:
        path = self.path / ADAPTER_WEIGHTS
        if not path.exists():
            raise CheckpointError(f"{path} is missing: save the adapter as safetensors, not as a pickle")
        try:
            file = TensorFile(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}: get it again") from None
        return {name.removeprefix(PREFIX): tensor for name, tensor in file.items()}


def _check_options(config: Mapping[str, Any], where: Path) -> None:
    """Raise CheckpointError for an option that changes what the adapter computes, and that we do not have."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where} has peft_type {config.get('peft_type')!r}, expected 'LORA'")
    draw = config.get("init_lora_weights")
    others = {"init_lora_weights": draw} if draw not in HARMLESS_DRAWS else {}
    parameters = config.get("target_parameters") or []
    if not all(str(name).endswith(LINEAR_WEIGHT) for name in parameters):  # experts, which are stacks
        others["target_parameters"] = parameters
    others |= {k: config[k] for k in config.keys() - READ - ASIDE - {"init_lora_weights"}}
    for name, value in sorted(others.items()):
        if value and value != "none":
            raise CheckpointError(
                f"{where} has {name} {json.dumps(value)}, which megalite does not compute: "
                "merge that adapter into its model with PEFT, and begin with the model"
            )


def _shape(shape: Shape | None) -> str:
    return "absent" if shape is None else str(list(shape))
