"""Tiny replicas for tests: a model for up to four stages and four tensor-parallel ranks, and its data."""

from dataclasses import dataclass
from typing import Any

import torch

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.model import ModelConfig
from megalite.config.run import DataConfig, OptimizerConfig, ParallelConfig, RunConfig
from megalite.parallel.context import ParallelContext
from megalite.training.replica import Replica, build_context

SEED, SEQ_LENGTH, BATCH, MICRO_BATCH, CLIP = 7, 16, 8, 2, 0.5
MODEL = ModelConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.08,
)
TIED = MODEL.model_copy(update={"tie_word_embeddings": True})
ADAM = OptimizerConfig(learning_rate=3e-3)


@dataclass(frozen=True)
class Case:
    """One layout and what else must not change the numbers."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 3
    sp: bool = True
    schedule: str = "1f1b"
    tied: bool = False
    recompute: str = "none"
    gathering: str = "step"
    precision: str = "fp32"
    documents: bool = False

    def __str__(self) -> str:
        changed = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(Case, name)]
        return ",".join(changed) or "one process"

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def model(self) -> ModelConfig:
        return TIED if self.tied else MODEL


def run_config(case: Case, optimizer: OptimizerConfig = ADAM, **sections: Any) -> RunConfig:
    parallel = ParallelConfig(
        tp_size=case.tp,
        pp_size=case.pp,
        sequence_parallel=case.sp,
        pipeline_schedule=case.schedule,
        parameter_gathering=case.gathering,
        recompute=case.recompute,
    )
    data = DataConfig(seq_length=SEQ_LENGTH)
    return RunConfig(
        model=case.model, parallel=parallel, data=data, optimizer=optimizer, seed=SEED, **sections
    )


def deepspeed_config(case: Case, **zero_options: Any) -> DeepSpeedConfig:
    raw: dict[str, Any] = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": case.zero, **zero_options},
    }
    if case.precision == "bf16":
        raw |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return DeepSpeedConfig(
        train_batch_size=BATCH,
        train_micro_batch_size_per_gpu=MICRO_BATCH,
        gradient_clipping=CLIP,
        zero_stage=case.zero,
        precision=case.precision,
        grad_accum_dtype="fp32",
        raw=raw,
    )


def build_replica(rank: int, case: Case, optimizer: OptimizerConfig = ADAM, **zero_options: Any) -> Replica:
    run = run_config(case, optimizer)
    context = build_context(run, rank, case.world_size, torch.device("cpu"))
    return Replica(run, deepspeed_config(case, **zero_options), context)


def global_batch(step: int, documents: bool = False) -> tuple[torch.Tensor, ...]:
    """Ids [BATCH, s], labels, and with `documents` where each token's document starts; on every rank."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(MODEL.vocab_size, (BATCH, SEQ_LENGTH + 1), generator=generator)
    batch = (tokens[:, :-1], tokens[:, 1:])
    if not documents:
        return batch
    border = torch.randint(1, SEQ_LENGTH, (BATCH, 1), generator=generator)
    place = torch.arange(SEQ_LENGTH)
    return *batch, torch.where(place >= border, border, 0)


def micro_batches(
    step: int, context: ParallelContext, documents: bool = False
) -> list[tuple[torch.Tensor, ...]]:
    """This rank's part of a global batch."""
    parts = (x.chunk(context.dp_size)[context.dp_rank] for x in global_batch(step, documents))
    return list(zip(*(part.split(MICRO_BATCH) for part in parts), strict=True))
