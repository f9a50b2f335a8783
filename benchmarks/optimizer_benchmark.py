"""Training of a byte-level Llama of 0.4 million parameters on the source of Python's standard library:
256,000 tokens in 250 steps of 8 samples of 128 tokens, on one CPU process in fp32. Muon against AdamW, each
with the best of three learning rates, the same data, and a cosine to a tenth of the rate. Losses are means
over the last 25 steps. Times are the processor's, medians over the steps, which others' work disturbs less.
"""

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.measurement import Measurement
from benchmarks.world import in_world
from megalite.config.data import DataConfig
from megalite.config.deepspeed import deepspeed_config_from
from megalite.config.model import ModelConfig
from megalite.config.optimizer import OptimizerConfig
from megalite.config.run import RunConfig
from megalite.config.schedule import ScheduleConfig

TITLE = "Training: Muon"
PEER = "AdamW"
RATES = {"muon": (5e-3, 1.2e-2, 2.5e-2), "adamw": (1e-3, 2e-3, 5e-3)}
NUM_STEPS, BATCH, NUM_LAST = 250, 8, 25
MODEL = ModelConfig(
    vocab_size=257,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


def measure() -> list[Measurement]:
    """The best losses of both, and what a step costs."""
    with TemporaryDirectory() as cache:
        found = {
            name: {rate: in_world(1, train, name, rate, cache)[0] for rate in rates}
            for name, rates in RATES.items()
        }
    return rows_of(found)


def rows_of(found: dict[str, dict[float, tuple[float, float, float]]]) -> list[Measurement]:
    """Rows of the table, from what `train` gave for each optimizer and rate."""
    best = {name: min(of_rates, key=lambda rate: of_rates[rate][0]) for name, of_rates in found.items()}
    muon, adamw = (found[name][best[name]] for name in ("muon", "adamw"))
    rows = [("loss, best of three rates", "nats", muon[0], adamw[0])]
    for ours, theirs in zip(found["muon"], found["adamw"], strict=True):
        losses = (found["muon"][ours][0], found["adamw"][theirs][0])
        rows.append((f"loss at rates {ours:g} and {theirs:g}", "nats", *losses))
    rows.append(("a step", "CPU ms", muon[1], adamw[1]))
    rows.append(("the optimizer's part", "CPU ms", muon[2], adamw[2]))
    return [Measurement(*row, higher_is_better=False) for row in rows]


def train(name: str, rate: float, cache: str) -> tuple[float, float, float]:
    """Mean of the last losses; median milliseconds of a step, and of the optimizer within it."""
    from megalite.training.checkpoints import Newest
    from megalite.training.data import open_data
    from megalite.training.lr_schedule import learning_rate_at
    from megalite.training.trainer import StageTrainer, build_context

    run = RunConfig(
        model=MODEL,
        data=DataConfig(seq_length=MODEL.max_position_embeddings, cache_dir=cache),
        optimizer=OptimizerConfig(name=name, learning_rate=rate),  # type: ignore[arg-type]
        schedule=ScheduleConfig(num_steps=NUM_STEPS, min_learning_rate=rate / 10),
        output_dir=str(Path(cache) / "run"),
    )
    raw = {"train_batch_size": BATCH, "train_micro_batch_size_per_gpu": BATCH, "gradient_clipping": 1.0}
    deepspeed = deepspeed_config_from(raw | {"zero_optimization": {"stage": 1}}, "the benchmark")
    context = build_context(run, 0, 1, torch.device("cpu"))
    run, data = open_data(run, deepspeed, context, NUM_STEPS * BATCH, Newest(None, {}), lambda text: None)
    trainer = StageTrainer(run, deepspeed, context)
    losses, seconds, updates = [], [], []
    update = trainer.engine.optimizer.step

    def timed_update(*arguments: Any, **options: Any) -> Any:
        started = time.process_time()
        update(*arguments, **options)
        updates.append(time.process_time() - started)

    trainer.engine.optimizer.step = timed_update
    for step in range(NUM_STEPS):
        batches = data.train.batch(step * BATCH)
        started = time.process_time()
        rate_now = learning_rate_at(step + 1, run.schedule, run.optimizer)
        losses.append(trainer.train_step(batches, rate_now).loss)
        seconds.append(time.process_time() - started)
    loss = statistics.mean(losses[-NUM_LAST:])
    return loss, 1e3 * statistics.median(seconds), 1e3 * statistics.median(updates)
