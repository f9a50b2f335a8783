"""Tiny trainers for tests: a model for up to four stages and four tensor-parallel ranks, and its data."""

from dataclasses import dataclass
from typing import Any

import torch

from megalite.batch import IGNORED, Batch
from megalite.config.balancing import BalancingConfig
from megalite.config.data import DataConfig
from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.fp8 import Fp8Config
from megalite.config.kernels import KernelConfig
from megalite.config.model import ModelConfig
from megalite.config.optimizer import OptimizerConfig
from megalite.config.parallel import ParallelConfig
from megalite.config.run import RunConfig
from megalite.config.tuning import LoraConfig
from megalite.kernels.choice import Kernels
from megalite.parallel.context import ParallelContext
from megalite.training.trainer import StageTrainer, build_context

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
# Two dense layers would hide an expert's; the first layer shows that stages may be without experts.
EXPERTS = MODEL.model_copy(
    update={
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
    }
)
SOFTMAX = EXPERTS.model_copy(
    update={"scoring_func": "softmax", "norm_topk_prob": False, "router_aux_loss_coef": 0.05}
)
DEEP = MODEL.model_copy(update={"num_hidden_layers": 8})  # for eight stages; untied, roundings grow in it
NORMS = MODEL.model_copy(update={"use_qk_norm": True})
QKV_BIASES = MODEL.model_copy(update={"attention_bias": True, "attention_out_bias": False})
NORMED_EXPERTS = EXPERTS.model_copy(update={"use_qk_norm": True, "attention_bias": True})
# What fp8 multiplies are multiples of 16, on four ranks too.
ALIGNED = MODEL.model_copy(
    update={"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 2}
)
ALIGNED_EXPERTS = EXPERTS.model_copy(
    update={"hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 2}
    | {"moe_intermediate_size": 32}
)
DEEP_ALIGNED = ALIGNED.model_copy(update={"num_hidden_layers": 4})
DEEP_ALIGNED_EXPERTS = ALIGNED_EXPERTS.model_copy(update={"num_hidden_layers": 4})
MODELS = {
    "dense": MODEL,
    "deep": DEEP,
    "norms": NORMS,
    "qkv biases": QKV_BIASES,
    "experts": EXPERTS,
    "normed experts": NORMED_EXPERTS,
    "softmax": SOFTMAX,
    "aligned": ALIGNED,
    "aligned experts": ALIGNED_EXPERTS,
    "deep aligned": DEEP_ALIGNED,
    "deep aligned experts": DEEP_ALIGNED_EXPERTS,
}
BIAS_RATE = 0.01
TIED = MODEL.model_copy(update={"tie_word_embeddings": True})
# Not the defaults, so that a default in the place of a setting shows; the references state them again.
ADAM = OptimizerConfig(learning_rate=3e-3, beta1=0.8, beta2=0.93, epsilon=1e-7, weight_decay=0.3)


@dataclass(frozen=True)
class Case:
    """One layout and what else must not change the numbers."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    zero: int = 3
    sp: bool = True
    way: str = "gather"  # of cp
    schedule: str = "1f1b"
    chunks: int | None = None
    layers: tuple[int, ...] | None = None  # of each stage
    weight_input: str = "gather"
    products: str = "auto"  # what computes them in linear layers
    tied: bool = False
    row_chunks: int = 1  # of what row layers scatter
    memory: bool = True  # that ranks share, instead of sockets
    recompute: str = "none"
    offload: bool = False
    tile: int = 0  # tokens of an MLP at a time
    gathering: str = "step"
    precision: str = "fp32"
    documents: bool = False  # four or so in each sample, of lengths that nothing divides
    model_kind: str = "dense"
    ep: int = 1
    rule: str = "sign"
    padded: bool = False  # tokens that only fill up a sample
    fp8: str = "none"
    compiled: bool = False  # what lies between matrix products, by torch.compile
    uneven: bool = False  # labels that do not count, and weights, unlike in every micro batch

    def __str__(self) -> str:
        changed = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(Case, name)]
        return ",".join(changed) or "one process"

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    @property
    def rate(self) -> float:
        """Of the learning rates: bf16's roundings are to be seen, not what large steps make of them."""
        return 1 / 3 if self.precision == "bf16" else 1.0

    @property
    def model(self) -> ModelConfig:
        return MODELS[self.model_kind].model_copy(update={"tie_word_embeddings": self.tied})


def run_config(case: Case, optimizer: OptimizerConfig = ADAM, **sections: Any) -> RunConfig:
    parallel = ParallelConfig(
        tp_size=case.tp,
        pp_size=case.pp,
        cp_size=case.cp,
        context_attention=case.way,
        ep_size=case.ep,
        sequence_parallel=case.sp,
        row_overlap_chunks=case.row_chunks,
        share_node_memory=case.memory,
        pipeline_schedule=case.schedule,
        num_chunks=case.chunks,
        layers_per_stage=case.layers and list(case.layers),
        weight_gradient_input=case.weight_input,
        parameter_gathering=case.gathering,
        recompute=case.recompute,
        offload_activations=case.offload,
        mlp_tile_tokens=case.tile,
    )
    data = DataConfig(seq_length=SEQ_LENGTH)
    balancing = BalancingConfig(rule=case.rule, update_rate=BIAS_RATE)
    facts = {"model": case.model, "parallel": parallel, "data": data, "optimizer": optimizer, "seed": SEED}
    facts |= {"balancing": balancing, "fp8": Fp8Config(recipe=case.fp8)}
    facts |= {"kernels": KernelConfig(compile_blocks=case.compiled, products=case.products)}
    return RunConfig(**facts | sections)


def deepspeed_config(case: Case, **zero_options: Any) -> DeepSpeedConfig:
    facts: dict[str, Any] = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": CLIP,
    }
    raw = facts | {"zero_optimization": {"stage": case.zero, **zero_options}}
    if case.precision == "bf16":
        raw |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return DeepSpeedConfig(
        **facts, zero_stage=case.zero, precision=case.precision, grad_accum_dtype="fp32", raw=raw
    )


def deepspeed_of(case: Case, num_micro_batches: int) -> DeepSpeedConfig:
    """With so many micro batches a step: fewer take less time."""
    size = {"train_micro_batch_size_per_gpu": BATCH // case.dp // num_micro_batches}
    whole = deepspeed_config(case)
    return whole.model_copy(update=size | {"raw": whole.raw | size})


def build_trainer(
    rank: int,
    case: Case,
    optimizer: OptimizerConfig = ADAM,
    seed: int = SEED,
    model: ModelConfig | None = None,
    lora: LoraConfig | None = None,
    kernels: Kernels | None = None,
    **zero_options: Any,
) -> StageTrainer:
    run = run_config(case, optimizer, seed=seed, model=model or case.model, lora=lora or LoraConfig())
    context = build_context(run, rank, case.world_size, torch.device("cpu"))
    trainer = StageTrainer(run, deepspeed_config(case, **zero_options), context, kernels=kernels)
    for chunk in trainer.engine.module:
        if chunk.lm_head is not None:
            chunk.lm_head.chunk_logits = 7 * 128  # 7 tokens of a rank's padded vocabulary: the last are fewer
    return trainer


def global_batch(step: int, *, documents: bool = False, uneven: bool = False, padded: bool = False) -> Batch:
    """The samples of a step [BATCH, s], the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(MODEL.vocab_size, (BATCH, SEQ_LENGTH + 1), generator=generator)
    starts = weights = padding = None
    labels = tokens[:, 1:]
    if documents:
        begins = torch.rand(BATCH, SEQ_LENGTH, generator=generator) < 0.2
        starts = torch.where(begins, torch.arange(SEQ_LENGTH), 0).cummax(dim=1).values
    if uneven:
        counted = torch.arange(SEQ_LENGTH) < 1 + 2 * torch.arange(BATCH).unsqueeze(1)  # 1, 3, 5, ... labels
        labels = labels.where(counted, IGNORED)
        weights = torch.rand(BATCH, SEQ_LENGTH, generator=generator)
    if padded:
        lengths = 1 + torch.arange(BATCH).unsqueeze(1) * 2  # 1, 3, 5, ... tokens are real
        padding = torch.arange(SEQ_LENGTH) >= lengths
    return Batch(tokens[:, :-1], labels, weights, document_starts=starts, padding=padding)


def global_batch_of(case: Case, step: int) -> Batch:
    return global_batch(step, documents=case.documents, uneven=case.uneven, padded=case.padded)


def micro_batches(step: int, context: ParallelContext, case: Case | None = None) -> list[Batch]:
    """This rank's part of a global batch."""
    dp = context["dp"]
    mine = global_batch_of(case or Case(), step).split(dp.size)[dp.rank]
    return mine.split(BATCH // dp.size // MICRO_BATCH)
