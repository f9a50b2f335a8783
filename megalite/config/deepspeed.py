"""What megalite reads of a DeepSpeed JSON, which owns batch sizes, precision, ZeRO and gradient clipping."""

import copy
import difflib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import AliasPath, ConfigDict, Field, ValidationError, model_validator

from megalite.config.batch import BatchSizes
from megalite.config.section import ConfigError, NonNegativeFloat, PositiveInt, explain

Precision = Literal["fp32", "bf16", "fp16"]

# A name that users may look for in the run's YAML -> the key of the DeepSpeed JSON that states the fact.
OWNED_BY_DEEPSPEED = {
    "batch_size": "train_batch_size",
    "train_batch_size": "train_batch_size",
    "global_batch_size": "train_batch_size",
    "micro_batch_size": "train_micro_batch_size_per_gpu",
    "train_micro_batch_size_per_gpu": "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
    "clip_grad": "gradient_clipping",
    "max_grad_norm": "gradient_clipping",
    "grad_clip": "gradient_clipping",
    "precision": "bf16",
    "dtype": "bf16",
    "torch_dtype": "bf16",
    "bf16": "bf16",
    "fp16": "fp16",
    "loss_scale": "fp16",
    "grad_accum_dtype": "data_types",
    "zero": "zero_optimization",
    "zero_stage": "zero_optimization",
    "zero_optimization": "zero_optimization",
}

# A key of the DeepSpeed JSON -> the key of the run's YAML that states the fact.
OWNED_BY_RUN = {
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "activation_checkpointing": "parallel.recompute",
    "tensor_parallel": "parallel.tp_size",
    "sequence_parallel_size": "parallel.sequence_parallel",
    "pipeline": "parallel.pp_size",
    "tensorboard": "logging.tensorboard",
    "zero_optimization.stage3_max_reuse_distance": "parallel.parameter_gathering",
    "zero_optimization.stage3_max_live_parameters": "parallel.parameter_gathering",
}


# Ways of DeepSpeed to take less memory that its own optimizers alone know.
NOT_SUPPORTED = (
    *(f"zero_optimization.{n}" for n in ("offload_optimizer", "offload_param", "cpu_offload", "zenflow")),
    "bf16.bf16_master_weights_and_grads",
    "bf16.bf16_optimizer_states",
    "fp16.fp16_master_weights_and_grads",
)


AUTO = "auto"  # what Hugging Face's users write where something else decides
KEEP_IN_FP32 = "data_types.keep_in_fp32_modules"
DEFAULT_CLIPPING = 1.0  # DeepSpeed's, and what Hugging Face's trainer puts in place of "auto"

_FORMATS = ("bf16", "fp16")
_OBJECTS = ("zero_optimization", "data_types", *_FORMATS)
_READ = (*BatchSizes.model_fields, "gradient_clipping", *_OBJECTS)


class DeepSpeedConfig(BatchSizes):
    """The facts of a DeepSpeed JSON that megalite acts on; `raw` is the whole, for DeepSpeed itself."""

    model_config = ConfigDict(populate_by_name=True)

    train_batch_size: PositiveInt  # these two are known by now
    train_micro_batch_size_per_gpu: PositiveInt
    gradient_clipping: NonNegativeFloat = Field(
        DEFAULT_CLIPPING, description="Largest global gradient norm; 0 means no clipping."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, validation_alias=AliasPath("zero_optimization", "stage"), description="Stage of ZeRO."
    )
    precision: Precision = Field("fp32", description="Number format of the weights in forward and backward.")
    grad_accum_dtype: Precision | None = Field(
        None,
        validation_alias=AliasPath("data_types", "grad_accum_dtype"),
        description="Number format that gradients are summed in; null means that of `precision`.",
    )
    raw: dict[str, Any] = Field(default_factory=dict, repr=False, description="The whole JSON object.")

    @model_validator(mode="after")
    def _zero_0_is_fp32(self) -> Self:
        # DeepSpeed's half-precision wrapper of plain optimizers takes a step on zero gradients at birth and
        # loses the norm of model-parallel ranks above 0; ZeRO-1 keeps both right.
        if self.zero_stage == 0 and self.precision != "fp32":
            raise ValueError(
                f"{self.precision} with ZeRO stage 0 gives a wrong gradient norm: "
                f"set zero_optimization.stage to 1"
            )
        return self

    def num_micro_batches(self, dp_size: int) -> int:
        """Micro batches that each of `dp_size` data-parallel ranks takes in one optimizer step.

        Raises ConfigError when the batch does not divide, or gradient_accumulation_steps says otherwise.
        """
        batch, micro = self.train_batch_size, self.train_micro_batch_size_per_gpu
        if batch % (micro * dp_size):
            raise ConfigError(
                f"train_batch_size {batch} is not divisible by train_micro_batch_size_per_gpu {micro} x "
                f"{dp_size} data-parallel ranks = {micro * dp_size}: change one of them in the DeepSpeed JSON"
            )
        steps, stated = batch // (micro * dp_size), self.gradient_accumulation_steps
        if stated is not None and stated != steps:
            raise ConfigError(
                f"gradient_accumulation_steps {stated} contradicts train_batch_size {batch} / "
                f"({micro} samples x {dp_size} data-parallel ranks) = {steps}: "
                f"remove it from the DeepSpeed JSON"
            )
        return steps


def load_deepspeed(
    path: str,
    run_path: str = "the run's YAML",
    *,
    dp_size: int | None = None,
    hidden_size: int | None = None,
) -> DeepSpeedConfig:
    """Read the DeepSpeed JSON at `path`, as deepspeed_config_from does.

    Raises ConfigError, in one line, for a file that is not there or not JSON as well.
    """
    return deepspeed_config_from(_read_json(path), path, run_path, dp_size=dp_size, hidden_size=hidden_size)


def deepspeed_config_from(
    raw: dict[str, Any],
    where: str,
    run_path: str = "the run's YAML",
    *,
    dp_size: int | None = None,
    hidden_size: int | None = None,
) -> DeepSpeedConfig:
    """What a DeepSpeed JSON says, with a number for each "auto" and each batch size that is left out.

    where, run_path: only named in messages. dp_size: data-parallel ranks, for batch sizes that follow from
    their number.
    hidden_size: the model's, in features, for bucket sizes that are "auto". Raises ConfigError, in one line,
    for a missing or wrong value, or a fact that the run's YAML owns.
    """
    _check_owners(raw, where, run_path)
    _check_spelling(raw, where)
    for name in _OBJECTS:
        if not isinstance(raw.get(name, {}), dict):
            raise ConfigError(f"{name} is {json.dumps(raw[name])}: expected an object in braces (in {where})")
    precision = _precision(raw, where)
    try:
        filled = _filled_in(raw, where, dp_size, hidden_size)
        facts = {name: filled[name] for name in _READ if _is_stated(filled, name)}
        config = DeepSpeedConfig.model_validate({**facts, "precision": precision, "raw": filled})
    except ValidationError as error:
        raise ConfigError(explain(error, default=f"in {where}")) from None
    _check_decided(config.raw, where)
    _check_memory(config.raw, where)
    if dp_size is not None:
        config.num_micro_batches(dp_size)  # raises when they do not fit
    return config


def _is_stated(raw: dict[str, Any], name: str) -> bool:
    """Whether a key is there; of an object, whether the one fact is there that megalite reads of it."""
    facts = {"zero_optimization": "stage", "data_types": "grad_accum_dtype"}
    return name in raw and name not in _FORMATS and (name not in facts or facts[name] in raw[name])


def _filled_in(
    raw: dict[str, Any], where: str, dp_size: int | None, hidden_size: int | None
) -> dict[str, Any]:
    """The JSON with numbers for what is left out or "auto", where megalite can decide them."""
    stated = {name: raw[name] for name in BatchSizes.model_fields if raw.get(name) not in (None, AUTO)}
    batch, micro = BatchSizes.model_validate(stated).derived(dp_size, where)
    sizes = stated | {"train_batch_size": batch, "train_micro_batch_size_per_gpu": micro}
    rest = {name: value for name, value in raw.items() if name not in BatchSizes.model_fields}
    filled = sizes | copy.deepcopy(rest)
    if filled.get("gradient_clipping", AUTO) == AUTO:
        filled["gradient_clipping"] = DEFAULT_CLIPPING
    if hidden_size is not None:
        zero = filled.get("zero_optimization", {})
        zero |= {name: size for name, size in auto_buckets(hidden_size).items() if zero.get(name) == AUTO}
    if _lookup(filled, KEEP_IN_FP32) == AUTO:  # DeepSpeed's own default, by that word
        del filled["data_types"]["keep_in_fp32_modules"]
    return filled


def auto_buckets(hidden_size: int) -> dict[str, int]:
    """What "auto" stands for in `zero_optimization`, in elements, as Hugging Face's trainer sets it."""
    return {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }


def _check_decided(value: Any, where: str, key: str = "") -> None:
    """Raise ConfigError for an "auto" that is left: DeepSpeed would silently take a default, or fail."""
    if value == AUTO:
        raise ConfigError(
            f'{key} is "{AUTO}" in {where}: nothing else decides it, write a value or remove the key'
        )
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    for name, inner in value.items() if isinstance(value, dict) else ():
        _check_decided(inner, where, f"{key}.{name}" if key else name)


def _check_memory(raw: dict[str, Any], where: str) -> None:
    """Raise ConfigError for state elsewhere than beside the weights, or in another format than fp32."""
    for key in NOT_SUPPORTED:
        value = _lookup(raw, key)
        if value and value != {"device": "none"}:
            raise ConfigError(
                f"{key} is {json.dumps(value)} in {where}: masters and moments are fp32, on the device of "
                "the weights: remove it, and use more ranks or parallel.recompute where memory is short"
            )


def _check_owners(raw: dict[str, Any], path: str, run_path: str) -> None:
    for key, owner in OWNED_BY_RUN.items():
        if _lookup(raw, key) is not None:
            raise ConfigError(
                f"stated in two places: '{key}' in {path} and '{owner}' in {run_path}; "
                f"remove the first, the run owns it"
            )


def _check_spelling(raw: dict[str, Any], path: str) -> None:
    # DeepSpeed ignores a key that it does not know: a slip would silently train with its default.
    for key in raw:
        meant = difflib.get_close_matches(key, [*_READ, *OWNED_BY_RUN], n=1, cutoff=0.8)
        meant = ["bf16"] if key == "bfloat16" else meant  # the old name, which DeepSpeed still obeys
        if meant and key not in meant:
            raise ConfigError(f"unknown key '{key}' in {path}: did you mean '{meant[0]}'?")


def _read_json(path: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"{path}: '{twice}' is stated twice; remove one")
        return dict(pairs)

    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise ConfigError(f"DeepSpeed configuration {path} not found: check --deepspeed_config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"DeepSpeed configuration {path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"DeepSpeed configuration {path} holds {raw!r}, expected an object")
    return raw


def _lookup(raw: dict[str, Any], key: str) -> Any:
    value: Any = raw
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _precision(raw: dict[str, Any], path: str) -> str:
    enabled = {name: _lookup(raw, f"{name}.enabled") or False for name in _FORMATS}
    for name, value in enabled.items():
        if not isinstance(value, bool):
            auto = ", as nothing else decides the precision" if value == AUTO else ""
            raise ConfigError(
                f"{name}.enabled is {json.dumps(value)}: expected true or false{auto} (in {path})"
            )
    if all(enabled.values()):
        raise ConfigError(f"bf16 and fp16 are both enabled in {path}: keep one")
    return next((name for name in _FORMATS if enabled[name]), "fp32")
