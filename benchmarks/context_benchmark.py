"""Forward and backward of a Llama of 2 layers and width 64 (4 heads, 2 for keys and values) on one sample of
16,384 tokens, cut over CPU processes of one thread (`cp_size`), in each way of attention. What a rank keeps
for backward is counted, weights left out; beside it, that of one process divided by the ranks. The same of
the time of a rank's processor, which waiting for others adds to.
"""

import time
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.measurement import Measurement
from benchmarks.world import in_world
from megalite.batch import Batch
from megalite.config.model import ModelConfig
from megalite.model.llama import LlamaStage
from megalite.parallel.context import ParallelContext
from megalite.parallel.plan import LayerPlan
from megalite.parallel.sequence import SequenceCut
from megalite.parallel.topology import Topology

TITLE = "Memory: long sequences over ranks"
PEER = "1/c of one process"
LENGTH = 16384
SIZES = (2, 4)
WAYS = ("gather", "ring", "heads")
CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
)


def measure() -> list[Measurement]:
    """Every way over 2 and 4 ranks, beside one process."""
    [whole] = in_world(1, measure_rank, 1, ["gather"])
    measurements = []
    for size in SIZES:
        ranks = in_world(size, measure_rank, size, list(WAYS))
        for way in WAYS:
            kept, seconds = (max(rank[way][i] for rank in ranks) for i in (0, 1))
            theory = [quantity / size for quantity in whole["gather"]]
            name = f"{way}, {size} ranks"
            options: dict[str, Any] = {"higher_is_better": False}
            measurements += [
                Measurement(f"{name}: kept for backward", "MiB", kept / 2**20, theory[0] / 2**20, **options),
                Measurement(f"{name}: processor time", "s", seconds, theory[1], **options),
            ]
    return measurements


def measure_rank(size: int, ways: list[str]) -> dict[str, tuple[float, float]]:
    """By way, bytes kept for backward and seconds of this rank's processor."""
    context = ParallelContext.build(Topology(size, cp_size=size), dist.get_rank(), torch.device("cpu"))
    ids = torch.randint(CONFIG.vocab_size, (1, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    places = SequenceCut(LENGTH, context["cp"]).places
    batch = Batch(ids[:, :-1], ids[:, 1:]).part(places)
    found: dict[str, tuple[float, float]] = {}
    for way in ways:
        stage = LlamaStage(CONFIG, LayerPlan(context), context_attention=way)
        started = time.process_time()
        kept = _kept_bytes(stage, batch)
        found[way] = kept, time.process_time() - started
    return found


def _kept_bytes(stage: LlamaStage, batch: Batch) -> int:
    """Of a forward pass, which backward follows."""
    weights = {parameter.data_ptr() for parameter in stage.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = stage(None, batch)
    loss.backward()
    return sum(kept.values())
