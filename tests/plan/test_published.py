"""Plans beside what others measured and published: tokens per second of a GPU as MFU, within a tenth.

The first five rows are those that the efficiency of an A100 was fitted to, and the efficiency of an H100 is a
round figure after the last three. A tenth is what one group's figure differs by from another's of the same
model and GPU (64 and 68 % for 7B). Models with a plain MLP of 4 h have a gated one of 8 h / 3 here, which is
as many parameters. Batches that are not published are 8 samples of 2,048 tokens per micro batch, or as fits.
"""

from pathlib import Path
from typing import NamedTuple

import pytest

from megalite.config.deepspeed import deepspeed_config_from
from megalite.config.device import load_device
from megalite.config.load import load_run
from megalite.plan.job import Job
from megalite.plan.plan import make_plan

DEVICES = Path(__file__).parents[2] / "configs" / "devices"
TOLERANCE = 0.1


class Published(NamedTuple):
    """Somebody's run: who, the model, how it was laid out, and the share of the peak that they report."""

    name: str
    device: str
    num_gpus: int
    model: str  # hidden, layers, heads, key/value heads, MLP width, vocabulary
    seq_length: int
    batch: int
    micro_batch: int
    mfu: float
    zero: int = 3
    parallel: str = ""


FOUNDRY = "llm-foundry"
INTERLEAVED = "tp_size=8 pipeline_schedule=interleaved"
ROWS = [
    Published(f"{FOUNDRY} 350M", "a100-80", 8, "1024 24 16 16 2752 50304", 2048, 256, 8, 0.516),
    Published(f"{FOUNDRY} 760M", "a100-80", 8, "1536 24 12 12 4096 50304", 2048, 256, 8, 0.569),
    Published(f"{FOUNDRY} 1B", "a100-80", 8, "2048 24 16 16 5440 50304", 2048, 256, 8, 0.599),
    Published(f"{FOUNDRY} 3B", "a100-80", 8, "2560 32 20 20 6848 50304", 2048, 256, 8, 0.621),
    Published(f"{FOUNDRY} 7B", "a100-80", 8, "4096 32 32 32 10944 50304", 2048, 96, 6, 0.642),
    Published(
        f"{FOUNDRY} 70B, gathered per layer", "a100-80", 64, "8192 80 64 64 21888 50368", 2048, 512, 8, 0.533,
        parallel="recompute=full parameter_gathering=micro_batch",
    ),
    Published(f"{FOUNDRY} 350M, 16 nodes", "a100-40", 128, "1024 24 16 16 2752 50304", 2048, 1024, 8, 0.456),
    Published("TinyLlama 1.1B", "a100-40", 16, "2048 22 32 4 5632 32000", 2048, 512, 8, 0.56),
    Published("fms-fsdp 7B, compiled", "a100-80", 128, "4096 32 32 32 11008 32000", 4096, 256, 2, 0.68),
    Published(
        "530B (arXiv 2205.05198)", "a100-80", 2240, "20480 105 128 128 54656 51200", 2048, 2240, 1,
        0.542, 1, f"{INTERLEAVED} pp_size=35 num_chunks=3 recompute=selective",
    ),
    Published(
        "the same, all computed again", "a100-80", 2240, "20480 105 128 128 54656 51200", 2048, 2240, 1,
        0.421, 1, f"{INTERLEAVED} pp_size=35 num_chunks=3 recompute=full sequence_parallel=false",
    ),
    Published(
        "Llama 3 405B (arXiv 2407.21783)", "h100", 8192, "16384 126 128 8 53248 128256", 8192, 2048, 1,
        0.43, 1, f"{INTERLEAVED} pp_size=16 num_chunks=7",
    ),
    Published("fms-fsdp 7B", "h100", 96, "4096 32 32 32 11008 32000", 4096, 192, 2, 0.46),
    Published(f"{FOUNDRY} 7B", "h100", 8, "4096 32 32 32 10944 50304", 2048, 96, 6, 0.464),
    Published(f"{FOUNDRY} 1B", "h100", 8, "2048 24 16 16 5440 50304", 2048, 256, 8, 0.418),
]  # fmt: skip


def job_of(row: Published) -> Job:
    """What was run, as a job of ours."""
    hidden, layers, heads, kv_heads, inner, vocabulary = row.model.split()
    model = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": vocabulary,
        "max_position_embeddings": row.seq_length,
    }  # fmt: skip
    overrides = [f"model.{key}={value}" for key, value in model.items()]
    overrides += [f"data.seq_length={row.seq_length}", *(f"parallel.{word}" for word in row.parallel.split())]
    raw = {
        "train_batch_size": row.batch,
        "train_micro_batch_size_per_gpu": row.micro_batch,
        "zero_optimization": {"stage": row.zero, "overlap_comm": True},
        "bf16": {"enabled": True},
    }
    device = load_device(DEVICES / f"{row.device}.yaml")
    return Job(load_run(None, overrides), deepspeed_config_from(raw, "a test"), device, row.num_gpus // 8, 8)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}, {row.device}")
def test_a_plan_is_within_a_tenth_of_what_was_published(row):
    assert make_plan(job_of(row)).mfu == pytest.approx(row.mfu, rel=TOLERANCE)
