"""A run as a value: everything that decides what is trained, except what the DeepSpeed JSON owns."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from megalite.config.model import ModelConfig
from megalite.config.section import (
    ConfigError,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)
from megalite.config.tuning import LoraConfig, PreferenceConfig


class ParallelConfig(Section):
    """How the model is spread over ranks; data parallelism takes what remains of the world."""

    tp_size: PositiveInt = Field(1, description="Ranks that share each layer (tensor parallelism).")
    pp_size: PositiveInt = Field(1, description="Stages that the layers are cut into (pipeline parallelism).")
    ep_size: PositiveInt = Field(
        1, description="Data-parallel ranks that share each layer's experts (expert parallelism); ZeRO-3."
    )
    sequence_parallel: bool = Field(
        True, description="Whether activations between layers are cut over tp along the sequence."
    )
    pipeline_schedule: Literal["1f1b", "afab"] = Field(
        "1f1b", description="Order of a stage's work: one forward one backward, or all forward all backward."
    )
    parameter_gathering: Literal["step", "micro_batch"] = Field(
        "step", description="ZeRO-3: gather a stage's parameters once per step (fast) or micro batch (small)."
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="Activations computed again in backward: none, attention only, or whole layers."
    )


class DataConfig(Section):
    """Where the tokens come from, and how they become samples."""

    train: list[str] | None = Field(
        None,
        description="Prefixes of the .bin and .idx files to train on, mixed by their sizes, or weight and "
        "prefix in turn; null means the source of Python's own standard library, as bytes.",
    )
    validation: list[str] | None = Field(
        None,
        description="The same for validation; null means a part of `train`, by `split`.",
    )
    seq_length: PositiveInt = Field(128, description="Length of one sample, in tokens.")
    mask_documents: bool = Field(
        False,
        description="Whether attention stays within each sequence of the token files (a document, as our "
        "tools write them), and positions restart there.",
    )
    split: str = Field("969,30,1", description="Weights of training, validation and test within `train`.")
    tokenizer: str | None = Field(
        None, description="Tokenizer folder or file that goes with the data into exports."
    )
    cache_dir: str | None = Field(
        None,
        description="Folder that keeps shuffled indices; null means `cache` beside the first training file.",
    )
    chat_template: str | None = Field(
        None,
        description="Fine-tuning: how conversations become text: a Jinja file, or the name of a template of "
        "ours; null means the tokenizer's own.",
    )
    packing: bool = Field(
        True,
        description="Fine-tuning: whether conversations share a sample, each attending to itself alone.",
    )
    allow_other_data: bool = Field(
        False,
        description="Whether to resume from a checkpoint that was trained on other data or in another order.",
    )

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        """One prefix is a list of one; weights are kept as they were written."""
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list):
            return items
        return [repr(item) if type(item) in (int, float) else item for item in items]

    @field_validator("train", "validation")
    @classmethod
    def _at_least_one_prefix(cls, value: list[str] | None) -> list[str] | None:
        if value == []:
            raise ValueError("no prefix given, expected at least 1: name a .bin/.idx pair, or write null")
        return value

    @field_validator("split")
    @classmethod
    def _three_weights(cls, value: str) -> str:
        try:
            weights = [float(part) for part in value.split(",")]
        except ValueError:
            weights = []
        if len(weights) != 3 or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise ValueError(f"{value!r} is not three weights like '969,30,1': training, validation, test")
        return value


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay (arXiv 1711.05101)."""

    name: Literal["adamw"] = Field("adamw", description="Optimizer.")
    learning_rate: PositiveFloat = Field(1e-3, description="Highest learning rate, reached after warm-up.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the gradient's running mean, per step.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the squared gradient's mean, per step.")
    epsilon: PositiveFloat = Field(1e-8, description="Added to the root of the squared gradient's mean.")
    weight_decay: NonNegativeFloat = Field(0.1, description="Decay of the weights, per unit learning rate.")


class BalancingConfig(Section):
    """How experts are kept equally busy: once per optimizer step, by the tokens of the global batch."""

    rule: Literal["none", "sign", "quantile"] = Field(
        "sign",
        description="How the routers' selection biases move: not, by a fixed step (arXiv 2408.15664), or to "
        "the quantile of the scores that would have given each expert its share.",
    )
    update_rate: PositiveFloat = Field(1e-3, description="Step of the sign rule, in units of the score.")


class ScheduleConfig(Section):
    """How long to train, and the learning rate along the way."""

    num_steps: PositiveInt = Field(200, description="Length of the run, in optimizer steps.")
    decay: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine",
        description="Curve after warm-up; wsd (warm-up, stable, decay) falls only at the end.",
    )
    warmup_steps: NonNegativeInt = Field(20, description="Length of the linear warm-up, in steps.")
    decay_steps: PositiveInt | None = Field(
        None,
        description="Length of the decay, in steps: it begins after warm-up, for wsd it ends with the run; "
        "null means all steps after warm-up, for wsd a tenth of the run.",
    )
    min_learning_rate: NonNegativeFloat = Field(1e-4, description="Learning rate at the end of the decay.")

    @model_validator(mode="after")
    def _constant_does_not_decay(self) -> Self:
        if self.decay == "constant" and self.decay_steps is not None:
            raise ValueError(f"decay 'constant' takes no decay_steps, {self.decay_steps} given: remove it")
        return self


class CheckpointConfig(Section):
    """When the run is saved, and what is kept."""

    save_every_steps: NonNegativeInt = Field(100, description="Steps between checkpoints; 0 means none.")
    resume: bool = Field(True, description="Whether to continue from the newest complete checkpoint.")
    start_from: str | None = Field(
        None,
        description="Checkpoint (RUN_DIR, its checkpoints or one step) or Hugging Face folder with whose "
        "weights a run begins that has no checkpoint of its own; null means random weights.",
    )
    keep_last: NonNegativeInt = Field(2, description="Number of newest checkpoints to keep; 0 means all.")
    save_at_end: bool = Field(True, description="Whether to save after the last step.")


class LoggingConfig(Section):
    """What is measured and shown while the run goes on."""

    log_every_steps: PositiveInt = Field(1, description="Steps between lines of progress.")
    validate_every_steps: NonNegativeInt = Field(50, description="Steps between validations; 0 means never.")
    validation_steps: PositiveInt = Field(
        4, description="Length of one validation, in batches of the size of an optimizer step."
    )
    evaluate_every_steps: NonNegativeInt = Field(
        0,
        description="Steps between evaluations on `evaluate_tasks`, the last step's included; 0 means never.",
    )
    evaluate_tasks: list[str] = Field(
        [], description="Tasks, groups or tags of lm-evaluation-harness; they need data.tokenizer."
    )
    evaluate_task_folder: str | None = Field(None, description="Folder with task files of your own.")
    evaluate_fewshot: NonNegativeInt | None = Field(
        None, description="Solved examples in each prompt; null means each task's own number."
    )
    evaluate_limit: PositiveInt | None = Field(
        None, description="Examples of each task that are used, the first ones; null means all."
    )
    tensorboard: bool = Field(True, description="Whether to write TensorBoard files.")
    progress_bar: bool = Field(True, description="Whether to draw a progress bar.")
    peak_tflops_per_device: PositiveFloat | None = Field(
        None,
        description="Peak speed of one device, in TFLOP/s, for the utilisation (MFU); null means that of "
        "a known GPU, or measured on a CPU.",
    )


class RunConfig(Section):
    """One training run. The DeepSpeed JSON owns batch sizes, precision, ZeRO and gradient clipping."""

    task: Literal["pretrain", "finetune", "prefer"] = Field(
        "pretrain", description="What is learnt: token files, conversations, or pairs; each has its launcher."
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="Shape of the model.")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="Layout over ranks.")
    data: DataConfig = Field(default_factory=DataConfig, description="Source of the tokens.")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="Adapters in place of weights.")
    preference: PreferenceConfig = Field(default_factory=PreferenceConfig, description="Loss on pairs.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="Optimizer.")
    balancing: BalancingConfig = Field(default_factory=BalancingConfig, description="Load of experts.")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="Length and learning rate.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Saving.")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="Measuring and showing.")
    seed: NonNegativeInt = Field(
        1234, le=2**32 - 1, description="Seed of the initial weights and of the data's order."
    )
    output_dir: str = Field("runs/default", description="Folder that receives all that the run writes.")

    @model_validator(mode="after")
    def _quantile_has_a_choice(self) -> Self:
        experts, chosen = self.model.n_routed_experts, self.model.num_experts_per_tok
        if experts and self.balancing.rule == "quantile" and experts == chosen:
            raise ValueError(
                f"balancing.rule 'quantile' has no choice: every token goes to all {experts} experts: "
                "set balancing.rule=none"
            )
        return self

    @model_validator(mode="after")
    def _evaluations_have_tasks(self) -> Self:
        needed = {
            "logging.evaluate_tasks": self.logging.evaluate_tasks,
            "data.tokenizer": self.data.tokenizer,
        }
        missing = [key for key, value in needed.items() if not value]
        if self.logging.evaluate_every_steps and missing:
            raise ValueError(
                f"logging.evaluate_every_steps is {self.logging.evaluate_every_steps} and {missing[0]} names "
                "nothing: name it, or set logging.evaluate_every_steps=0"
            )
        return self

    @model_validator(mode="after")
    def _learning_rate_falls(self) -> Self:
        low, high = self.schedule.min_learning_rate, self.optimizer.learning_rate
        if low > high and self.schedule.decay != "constant":
            raise ValueError(
                f"schedule.min_learning_rate {low} exceeds optimizer.learning_rate {high}: lower it"
            )
        return self

    def dp_size_of(self, world_size: int) -> int:
        """Data-parallel ranks among `world_size`; ConfigError where the model does not fit on those."""
        tp_size, pp_size = self.parallel.tp_size, self.parallel.pp_size
        if world_size % (tp_size * pp_size):
            processes = "1 process" if world_size == 1 else f"{world_size} processes"
            raise ConfigError(
                f"{processes} cannot be divided into tp_size {tp_size} x pp_size {pp_size}: "
                f"start a multiple of {tp_size * pp_size}, or change parallel.tp_size or parallel.pp_size"
            )
        self.check_tensor_parallel(tp_size)
        self._check_experts(world_size // (tp_size * pp_size))
        self._check_sequence(tp_size)
        layers = self.model.num_hidden_layers
        if layers < pp_size:
            raise ConfigError(
                f"parallel.pp_size {pp_size} exceeds model.num_hidden_layers {layers}: "
                f"use at most {layers} stages"
            )
        return world_size // (tp_size * pp_size)

    def check_tensor_parallel(self, tp_size: int) -> None:
        """ConfigError where the model's layers cannot be cut over so many ranks."""
        heads, kv_heads = self.model.num_attention_heads, self.model.num_key_value_heads
        sizes = {"num_attention_heads": heads, "intermediate_size": self.model.intermediate_size}
        sizes |= {"moe_intermediate_size": self.model.moe_intermediate_size or 0}
        for name, size in sizes.items():
            if size % tp_size:
                raise ConfigError(
                    f"model.{name} {size} is not divisible by parallel.tp_size {tp_size}: "
                    f"use a tp_size that divides {size}"
                )
        if kv_heads % tp_size and tp_size % kv_heads:
            raise ConfigError(
                f"model.num_key_value_heads {kv_heads} and parallel.tp_size {tp_size} do not fit: "
                f"use a tp_size that divides {kv_heads} or is a multiple of it"
            )

    def _check_experts(self, dp_size: int) -> None:
        ep_size, experts = self.parallel.ep_size, self.model.n_routed_experts
        if ep_size == 1:
            return
        if not experts:
            raise ConfigError(f"parallel.ep_size {ep_size} and no experts: set model.n_routed_experts, or 1")
        for what, size in {"model.n_routed_experts": experts, "the data-parallel ranks": dp_size}.items():
            if size % ep_size:
                raise ConfigError(
                    f"parallel.ep_size {ep_size} does not divide {what}, {size}: use a divisor of {size}"
                )

    def check_zero_stage(self, stage: int) -> None:
        """Raise ConfigError where DeepSpeed has one data-parallel group, and experts would need another."""
        ep_size = self.parallel.ep_size
        if ep_size > 1 and stage < 3:
            raise ConfigError(
                f"parallel.ep_size {ep_size} needs ZeRO stage 3 and the DeepSpeed JSON says {stage}, where "
                "all gradients are averaged over one group: use stage 3, or parallel.ep_size=1"
            )

    def _check_sequence(self, tp_size: int) -> None:
        seq_length, longest = self.data.seq_length, self.model.max_position_embeddings
        if seq_length > longest:
            raise ConfigError(
                f"data.seq_length {seq_length} exceeds model.max_position_embeddings {longest}: "
                f"shorten the samples or lengthen the context"
            )
        if self.parallel.sequence_parallel and seq_length % tp_size:
            raise ConfigError(
                f"data.seq_length {seq_length} is not divisible by parallel.tp_size {tp_size}: "
                f"change one, or set parallel.sequence_parallel=false"
            )
