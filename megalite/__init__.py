"""Megatron-style model parallelism for Llama decoders under DeepSpeed; also a library of its parts."""

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported when first used: `megalite.config` is to be importable without torch.
_HOMES = {
    "Batch": "megalite.batch",
    "LayerPlan": "megalite.parallel.plan",
    "ColumnParallelLinear": "megalite.parallel.linear",
    "Column": "megalite.parallel.linear",
    "MergedColumnLinear": "megalite.parallel.linear",
    "RowParallelLinear": "megalite.parallel.linear",
    "VocabParallelEmbedding": "megalite.parallel.embedding",
    "ParallelRMSNorm": "megalite.parallel.norm",
    "vocab_parallel_cross_entropy": "megalite.parallel.cross_entropy",
    "ShardSpec": "megalite.parallel.shard",
    "Topology": "megalite.parallel.topology",
    "ParallelContext": "megalite.parallel.context",
    "ModelParallelUnit": "megalite.parallel.mpu",
    "Peers": "megalite.pipeline.p2p",
    "PipelineRunner": "megalite.pipeline.runner",
    "build_schedule": "megalite.pipeline.schedule",
    "ModelConfig": "megalite.config.model",
    "LlamaStage": "megalite.model.llama",
    "load": "megalite.checkpoint.model",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megalite' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
