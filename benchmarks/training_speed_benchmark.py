"""Optimizer steps of a 2M-parameter Llama on one CPU process, 16 samples of 128 tokens in 4 micro batches,
fp32: megalite with DeepSpeed's ZeRO-1 around it, against transformers' LlamaForCausalLM in a plain PyTorch
loop with the same weights, fused AdamW and clipping. Both give the same losses, which is checked.
"""

import math
from collections.abc import Callable

import torch

from benchmarks.measurement import Measurement, median_seconds
from benchmarks.world import in_world
from megalite.batch import Batch
from megalite.checkpoint.hf_config import hf_config
from megalite.config.deepspeed import deepspeed_config_from
from megalite.config.run import RunConfig
from megalite.parallel.shard import spec_of

TITLE = "Training: one process"
PEER = "transformers"
BATCH, MICRO_BATCH, ROUNDS, CLIP = 16, 4, 15, 1.0
RUN = RunConfig()


def measure() -> list[Measurement]:
    """Tokens per second of both, taking turns in one process."""
    [(ours, theirs)] = in_world(1, tokens_per_second)
    return [Measurement("training", "tokens/s", ours, theirs)]


def tokens_per_second() -> tuple[float, float]:
    """megalite's and the peer's speed, in this process."""
    steps = _build_steps()
    for name in ("ours", "theirs"):
        steps[name]()
    first = [steps[name]() for name in ("ours", "theirs")]
    if not math.isclose(*first, rel_tol=1e-4):
        raise RuntimeError(f"the losses differ: {first}")
    seconds = median_seconds(steps, ROUNDS)
    tokens = BATCH * RUN.data.seq_length
    return tokens / seconds["ours"], tokens / seconds["theirs"]


def _build_steps() -> dict[str, Callable[[], float]]:
    from megalite.training.trainer import StageTrainer, build_context

    raw = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 1},
    }
    deepspeed = deepspeed_config_from(raw, "the benchmark")
    trainer = StageTrainer(RUN, deepspeed, build_context(RUN, 0, 1, torch.device("cpu")))
    tokens = torch.randint(RUN.model.vocab_size, (BATCH, RUN.data.seq_length + 1))
    batches = Batch(tokens[:, :-1], tokens[:, 1:].contiguous()).split(BATCH // MICRO_BATCH)
    theirs = _plain_step(trainer.engine.module, batches)
    rate = RUN.optimizer.learning_rate
    return {"ours": lambda: trainer.train_step(batches, rate).loss, "theirs": theirs}


def _plain_step(stage: torch.nn.Module, batches: list[Batch]) -> Callable[[], float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**hf_config(RUN.model, "float32")))
    weights = {spec_of(p).name: p.detach()[: spec_of(p).box_shape[0]].clone() for p in stage.parameters()}
    model.load_state_dict(weights)
    options = RUN.optimizer
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == flag] for flag in (True, False))
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
        fused=True,
    )

    def step() -> float:
        total = 0.0
        for batch in batches:
            logits, labels = model(batch.input_ids).logits, batch.labels
            assert labels is not None
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) / len(batches)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step
