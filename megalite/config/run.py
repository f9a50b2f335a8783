"""A run as a value: everything that decides what is trained, except what the DeepSpeed JSON owns."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megalite.config.balancing import BalancingConfig
from megalite.config.checkpoint import CheckpointConfig
from megalite.config.data import DataConfig
from megalite.config.fp8 import Fp8Config
from megalite.config.guard import GuardConfig
from megalite.config.kernels import KernelConfig
from megalite.config.logging import LoggingConfig
from megalite.config.memory import MemoryConfig
from megalite.config.model import ModelConfig
from megalite.config.muon import NOT_WITH_MUON
from megalite.config.optimizer import OptimizerConfig
from megalite.config.parallel import ParallelConfig
from megalite.config.schedule import ScheduleConfig
from megalite.config.section import ConfigError, NonNegativeInt, Section
from megalite.config.stop import StopConfig
from megalite.config.tuning import LoraConfig, PreferenceConfig
from megalite.config.watch import WatchConfig


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
    def _fp8_rounds_whole_products(self) -> Self:
        if self.parallel.row_overlap_chunks > 1 and self.fp8.recipe != "none":
            raise ValueError(
                f"parallel.row_overlap_chunks {self.parallel.row_overlap_chunks} multiplies in pieces and "
                f"fp8.recipe {self.fp8.recipe} rounds whole tensors: set "
                "parallel.row_overlap_chunks=1, or fp8.recipe=none"
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
