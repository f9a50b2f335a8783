"""A run as a value: everything that decides what is trained, except what the DeepSpeed JSON owns."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from megalite.config.fp8 import Fp8Config
from megalite.config.model import ModelConfig
from megalite.config.muon import NOT_WITH_MUON, MuonConfig
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
    cp_size: PositiveInt = Field(
        1, description="Ranks that each sample's sequence is cut over (context parallelism)."
    )
    context_attention: Literal["gather", "ring", "heads"] = Field(
        "gather",
        description="How these attend to each other's keys and values: all gathered (fast), going round a "
        "ring (small), or whole sequences for a part of the heads each (all-to-all).",
    )
    pp_size: PositiveInt = Field(1, description="Stages that the layers are cut into (pipeline parallelism).")
    ep_size: PositiveInt = Field(
        1, description="Data-parallel ranks that share each layer's experts (expert parallelism); ZeRO-3."
    )
    sequence_parallel: bool = Field(
        True, description="Whether activations between layers are cut over tp along the sequence."
    )
    pipeline_schedule: Literal["1f1b", "afab", "interleaved", "zb-h1", "zbv"] = Field(
        "1f1b",
        description="Order of a stage's work: one forward one backward, all forward all backward, 1F1B over "
        "several chunks, or without waiting by a split backward, in one chunk (ZB-H1) or two (ZBV).",
    )
    num_chunks: PositiveInt | None = Field(
        None,
        description="Chunks of layers per rank; null means 2 for interleaved and zbv, 1 for others.",
    )
    weight_gradient_input: Literal["gather", "keep"] = Field(
        "gather",
        description="Split backward, sequence parallelism: inputs that were gathered over tp are gathered "
        "again for the weights' gradients, or kept until then (tp_size times the memory).",
    )
    parameter_gathering: Literal["step", "micro_batch"] = Field(
        "step", description="ZeRO-3: gather a stage's parameters once per step (fast) or micro batch (small)."
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="Activations computed again in backward: none, attention only, or whole layers."
    )
    offload_activations: bool = Field(
        False,
        description="Recompute full: whether the inputs of layers wait for backward in host memory.",
    )
    mlp_tile_tokens: NonNegativeInt = Field(
        0,
        description="Tokens that go through a feed-forward layer at a time, for samples so long that its "
        "inner activations would not fit; backward computes each tile again. 0 means all at once.",
    )

    @model_validator(mode="after")
    def _what_waits_is_the_input_of_layers(self) -> Self:
        if self.offload_activations and self.recompute != "full":
            raise ValueError(
                f"offload_activations keeps the inputs of layers, and recompute {self.recompute!r} keeps "
                "more: set parallel.recompute=full"
            )
        return self


class KernelConfig(Section):
    """What computes the parts of a layer; `auto` is what serves the device best, told when the run starts."""

    attention: Literal["auto", "blocks", "sdpa", "flex"] = Field(
        "auto",
        description="Batched products on blocks of rows (fastest on a CPU), torch's "
        "scaled_dot_product_attention, or on a GPU FlexAttention where there are documents.",
    )
    attention_kept_tokens: NonNegativeInt | None = Field(
        None,
        description="Blocks: the longest sample, in tokens, whose attention probabilities are kept for "
        "backward, which computes those of longer ones again; null means short ones, where they take about "
        "as much memory as the other activations.",
    )
    norm: Literal["auto", "rows", "torch", "apex", "liger"] = Field(
        "auto",
        description="RMSNorm in few passes over memory (fastest on a CPU), torch's rms_norm, that of "
        "NVIDIA's apex, or on a GPU that of Liger Kernel.",
    )
    gating: Literal["auto", "torch", "liger"] = Field(
        "auto",
        description="silu(gate) * up as torch computes it, or on a GPU that of Liger Kernel, which keeps two "
        "tensors of them for backward and not three.",
    )


class MemoryConfig(Section):
    """What a process keeps of the memory that it lets go of."""

    mapped_block_mib: NonNegativeInt = Field(
        4,
        description="CPU: blocks of memory of so many MiB and more go back to the system when freed; 0 "
        "leaves glibc its own rule, which is faster with small models, and holds several times as much.",
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
        description="Whether to resume from a checkpoint even where its place in these data is not known, as "
        "if the run had read them from its beginning.",
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
    """AdamW with decoupled weight decay (arXiv 1711.05101), or Muon for matrices and AdamW for the rest."""

    name: Literal["adamw", "muon"] = Field("adamw", description="Optimizer.")
    implementation: Literal["auto", "torch", "apex"] = Field(
        "auto",
        description="What computes AdamW's update, also that beside Muon: torch's fused one, or on a GPU "
        "the one of NVIDIA's apex. Checkpoints are the same.",
    )
    learning_rate: PositiveFloat = Field(1e-3, description="Highest learning rate, reached after warm-up.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the gradient's running mean, per step.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the squared gradient's mean, per step.")
    epsilon: PositiveFloat = Field(1e-8, description="Added to the root of the squared gradient's mean.")
    weight_decay: NonNegativeFloat = Field(0.1, description="Decay of the weights, per unit learning rate.")
    muon: MuonConfig = Field(default_factory=MuonConfig, description="Settings of Muon alone.")

    @model_validator(mode="after")
    def _muon_is_used(self) -> Self:
        if self.name != "muon" and self.muon != MuonConfig():
            raise ValueError(
                f"name {self.name!r} has no use for the settings of muon: set name=muon, or remove them"
            )
        return self


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
    keep_every_steps: NonNegativeInt = Field(
        0, description="Those of steps that this divides are kept as well; 0 means none."
    )
    keep_best: NonNegativeInt = Field(
        0, description="Number of checkpoints with the lowest validation loss to keep as well."
    )
    save_at_end: bool = Field(True, description="Whether to save after the last step.")
    asynchronous: bool = Field(
        True,
        description="Whether training goes on while a checkpoint is written, from a copy in host memory.",
    )
    local_dir: str | None = Field(
        None,
        description="Folder on each node's own disk in which a checkpoint is complete first, before it is "
        "copied to RUN_DIR/checkpoints; null means that it is written there at once.",
    )
    shared_every_saves: PositiveInt = Field(
        1,
        description="Of the saves in local_dir, how many there are for one that is copied; the first of a "
        "job is, and so is the newest when the job ends or RUN_DIR/save asks for it.",
    )
    on_failure: Literal["continue", "stop"] = Field(
        "continue",
        description="What a checkpoint that cannot be written does to the run; where the last one cannot, "
        "the run ends with exit status 74 in any case.",
    )

    @model_validator(mode="after")
    def _others_stay_beside_the_newest(self) -> Self:
        if not self.keep_last and (self.keep_every_steps or self.keep_best):
            raise ValueError("keep_last 0 keeps all: set it, or neither keep_every_steps nor keep_best")
        return self

    @model_validator(mode="after")
    def _what_is_not_shared_is_local(self) -> Self:
        if self.shared_every_saves > 1 and self.local_dir is None:
            raise ValueError(
                f"shared_every_saves is {self.shared_every_saves} and local_dir is null: say where the "
                "others go with checkpoint.local_dir, or set shared_every_saves to 1"
            )
        return self


class GuardConfig(Section):
    """Steps that are not taken: those whose loss or gradient norm is no number, and spikes."""

    max_skipped_in_a_row: NonNegativeInt = Field(
        3, description="Steps that may be skipped one after another; one more ends the run."
    )
    spike_sigma: NonNegativeFloat = Field(
        0.0,
        description="A spike is a loss or norm above the mean of the last steps by so many standard "
        "deviations; 0 means that no number is one.",
    )
    window_steps: PositiveInt = Field(64, description="Steps that a spike is measured against.")
    on_spike: Literal["skip", "roll_back"] = Field(
        "skip",
        description="Whether such a step is skipped, or the run goes back to its newest checkpoint and "
        "leaves the samples of that step out.",
    )
    max_rollbacks: NonNegativeInt = Field(
        3, description="How often a run may go back; then such steps are skipped."
    )
    check_copies_every_steps: NonNegativeInt = Field(
        0,
        description="Steps between comparisons of all state that several ranks hold, bit by bit; 0 means "
        "never. A difference ends the run and names rank and tensor.",
    )

    @property
    def most_rollbacks(self) -> int:
        """How many batches the run may come to leave out."""
        return self.max_rollbacks if self.on_spike == "roll_back" else 0


class StopConfig(Section):
    """What ends a run before its last step, with a checkpoint and exit status 75; signals do so always."""

    after_minutes: PositiveFloat | None = Field(
        None, description="Minutes after the start of the job; null means none."
    )
    after_starts: NonNegativeInt = Field(
        0,
        description="Starts in a row that came to no newer checkpoint, after which the run is not started "
        "again (exit status 93); 0 means any number.",
    )


class WatchConfig(Section):
    """When a rank counts as hanging: then RUN_DIR/stacks gets all stacks, and the job ends with status 76.

    0 seconds watch for nothing. A limit but for start-up grows with what a place has taken so far.
    """

    stopped_seconds: NonNegativeFloat = Field(
        60.0,
        description="Seconds in which nothing is heard of a rank that is stopped, or whose node is; more of "
        "them with more than 5,000 ranks.",
    )
    step_seconds: NonNegativeFloat = Field(
        300.0,
        description="Seconds without progress while a step reads its data, goes forward and backward, or is "
        "in the optimizer; less than the timeouts of the collectives, which blame who waits.",
    )
    factor: NonNegativeFloat = Field(
        10.0, description="Times the longest stay so far that a place is allowed, where that is more."
    )
    start_up_seconds: NonNegativeFloat = Field(
        3600.0, description="Seconds without progress until the first step is done; silence is allowed too."
    )
    saving_seconds: NonNegativeFloat = Field(1800.0, description="Seconds that saving may take.")
    evaluation_seconds: NonNegativeFloat = Field(
        3600.0, description="Seconds that a batch of a validation, or an evaluation on tasks, may take."
    )


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
    timeline_at_step: NonNegativeInt = Field(
        0,
        description="Step whose timeline each rank records to RUN_DIR/timeline-rankR.json, for "
        "`tools/plot_timeline.py`; 0 means none.",
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
    kernels: KernelConfig = Field(default_factory=KernelConfig, description="What computes layers.")
    fp8: Fp8Config = Field(default_factory=Fp8Config, description="Products of linear layers in 8 bits.")
    memory: MemoryConfig = Field(default_factory=MemoryConfig, description="Memory of processes.")
    data: DataConfig = Field(default_factory=DataConfig, description="Source of the tokens.")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="Adapters in place of weights.")
    preference: PreferenceConfig = Field(default_factory=PreferenceConfig, description="Loss on pairs.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="Optimizer.")
    balancing: BalancingConfig = Field(default_factory=BalancingConfig, description="Load of experts.")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="Length and learning rate.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Saving.")
    guard: GuardConfig = Field(default_factory=GuardConfig, description="Steps that are not taken.")
    stop: StopConfig = Field(default_factory=StopConfig, description="Ending early.")
    watch: WatchConfig = Field(default_factory=WatchConfig, description="Ranks that hang.")
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
    def _muon_has_no_adapters(self) -> Self:
        if self.optimizer.name == "muon" and self.lora.rank:
            raise ValueError(
                f"optimizer.name 'muon' steps whole matrices and lora.rank {self.lora.rank} trains factors "
                "of what is added to them: set optimizer.name=adamw, or lora.rank=0"
            )
        return self

    @model_validator(mode="after")
    def _the_best_is_known(self) -> Self:
        saved, validated = self.checkpoint.save_every_steps, self.logging.validate_every_steps
        if self.checkpoint.keep_best and (not validated or saved % validated):
            raise ValueError(
                f"checkpoint.keep_best {self.checkpoint.keep_best} needs a validation at each step that is "
                f"saved, and checkpoint.save_every_steps {saved} is no multiple of "
                f"logging.validate_every_steps {validated}: make it one, or set checkpoint.keep_best=0"
            )
        return self

    @model_validator(mode="after")
    def _evaluations_have_tasks(self) -> Self:
        needed = {
            "logging.evaluate_tasks": self.logging.evaluate_tasks,
            "data.tokenizer": self.data.tokenizer or self.data.train is None,  # default data has its own
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

    @model_validator(mode="after")
    def _tiles_have_no_scales(self) -> Self:
        if self.fp8.recipe != "none" and self.parallel.mlp_tile_tokens:
            raise ValueError(
                f"parallel.mlp_tile_tokens {self.parallel.mlp_tile_tokens} would scale each tile by itself "
                f"under fp8.recipe {self.fp8.recipe}, and so change the numbers: set it to 0, or "
                "fp8.recipe=none"
            )
        return self

    @property
    def rows_per_sample(self) -> int:
        """Rows of `data.seq_length` tokens in a sample: a pair of answers is two."""
        return 2 if self.task == "prefer" and not self.has_mismatched_rows else 1

    @property
    def has_mismatched_rows(self) -> bool:
        """Whether beside each row goes one that is not learnt, of the same prompt and another's answer."""
        return self.task == "prefer" and self.preference.loss == "kto"

    @property
    def tokens_per_sample(self) -> int:
        """What the model computes of each sample, padding included."""
        return self.rows_per_sample * self.data.seq_length

    def dp_size_of(self, world_size: int) -> int:
        """Data-parallel ranks among `world_size`; ConfigError where the model does not fit on those."""
        tp_size, pp_size, cp_size = self.parallel.tp_size, self.parallel.pp_size, self.parallel.cp_size
        model_ranks = tp_size * pp_size * cp_size
        if world_size % model_ranks:
            processes = "1 process" if world_size == 1 else f"{world_size} processes"
            sizes = {"tp_size": tp_size, "pp_size": pp_size} | ({"cp_size": cp_size} if cp_size > 1 else {})
            named = " x ".join(f"{name} {size}" for name, size in sizes.items())
            raise ConfigError(
                f"{processes} cannot be divided into {named}: "
                f"start a multiple of {model_ranks}, or change {' or '.join(f'parallel.{n}' for n in sizes)}"
            )
        self.check_tensor_parallel(tp_size)
        self._check_experts(world_size // (tp_size * pp_size))
        self._check_sequence(tp_size)
        self._check_context()
        layers = self.model.num_hidden_layers
        if layers < pp_size:
            raise ConfigError(
                f"parallel.pp_size {pp_size} exceeds model.num_hidden_layers {layers}: "
                f"use at most {layers} stages"
            )
        return world_size // model_ranks

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

    def check_zero_options(self, raw: Mapping[str, Any]) -> None:
        """Raise ConfigError for options of ZeRO with which DeepSpeed 0.19.8 is silently wrong.

        raw: the DeepSpeed JSON.
        """
        options = raw.get("zero_optimization") or {}
        if options.get("round_robin_gradients") and options.get("stage") in (1, 2):
            raise ConfigError(
                "zero_optimization.round_robin_gradients puts parameters in another order, and DeepSpeed's "
                "record of where they lie in the old one, so that checkpoints would have one's weights under "
                "another's name: remove it from the DeepSpeed JSON"
            )
        size = options.get("zero_hpz_partition_size", 1)
        axes = {name: getattr(self.parallel, name) for name in ("tp_size", "pp_size", "ep_size")}
        others = [f"parallel.{name} {number}" for name, number in axes.items() if number > 1]
        if size > 1 and others:
            raise ConfigError(
                f"zero_optimization.zero_hpz_partition_size {size} groups neighbouring ranks, which under "
                f"{others[0]} hold other parts of the model: remove it from the DeepSpeed JSON"
            )

    def check_optimizer(self, raw: Mapping[str, Any]) -> None:
        """Raise ConfigError where the optimizer does not go with the model, or with DeepSpeed's options.

        raw: the DeepSpeed JSON.
        """
        if self.optimizer.name != "muon":
            return
        for section, names in NOT_WITH_MUON.items():
            stated = raw.get(section) or {}
            for name in names:
                if stated.get(name) and stated[name] != {"device": "none"}:
                    raise ConfigError(
                        f"optimizer.name 'muon' needs fp32 masters on the device of the weights, and the "
                        f"DeepSpeed JSON has {section}.{name}: remove it, or set optimizer.name=adamw"
                    )
        threshold = self.optimizer.muon.qk_clip
        if threshold is not None and self.parallel.cp_size > 1:
            raise ConfigError(
                f"optimizer.muon.qk_clip {threshold:g} looks at whole sequences and parallel.cp_size is "
                f"{self.parallel.cp_size}: set optimizer.muon.qk_clip=null, or parallel.cp_size=1"
            )
        others = [name for name in ("use_qk_norm", "attention_bias") if getattr(self.model, name)]
        if threshold is not None and others:
            raise ConfigError(
                f"optimizer.muon.qk_clip {threshold:g} scales the weights of queries and model.{others[0]} "
                "is true, which the logits also depend on: set optimizer.muon.qk_clip=null"
            )

    def _check_sequence(self, tp_size: int) -> None:
        seq_length, longest = self.data.seq_length, self.model.max_position_embeddings
        if seq_length > longest:
            raise ConfigError(
                f"data.seq_length {seq_length} exceeds model.max_position_embeddings {longest}: "
                f"shorten the samples or lengthen the context"
            )
        cp_size = self.parallel.cp_size
        if cp_size > 1 and seq_length % (2 * cp_size):
            raise ConfigError(
                f"data.seq_length {seq_length} is not divisible by {2 * cp_size}, 2 chunks for each of "
                f"parallel.cp_size {cp_size} ranks: use a multiple of {2 * cp_size}"
            )
        if self.parallel.sequence_parallel and seq_length // cp_size % tp_size:
            of_rank = f" / parallel.cp_size {cp_size}" if cp_size > 1 else ""
            raise ConfigError(
                f"data.seq_length {seq_length}{of_rank} is not divisible by parallel.tp_size {tp_size}: "
                f"change one, or set parallel.sequence_parallel=false"
            )

    def _check_context(self) -> None:
        """Where heads are exchanged for the sequence, each rank needs as many."""
        tp_size, cp_size = self.parallel.tp_size, self.parallel.cp_size
        if self.parallel.context_attention != "heads" or cp_size == 1:
            return
        queries = self.model.num_attention_heads // tp_size
        keys = max(1, self.model.num_key_value_heads // tp_size)
        fits = {"num_attention_heads": (queries, queries % cp_size == 0)}
        fits["num_key_value_heads"] = keys, keys % cp_size == 0 or cp_size % keys == 0
        for name, (heads, does_fit) in fits.items():
            if not does_fit:
                raise ConfigError(
                    f"model.{name} makes {heads} on each of parallel.tp_size {tp_size} ranks, which "
                    f"parallel.cp_size {cp_size} does not divide: choose another cp_size, or "
                    "parallel.context_attention=gather"
                )
