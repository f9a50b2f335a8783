"""Sizes of ZeRO's buckets, from the model (pure arithmetic).

DeepSpeed's defaults are for models of tens of gigabytes: a bucket of 500 million gradients, 2 GB in fp32,
holds all of a model of 460 million parameters at once.
"""

from collections.abc import Mapping
from typing import Any

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.config.section import ConfigError
from megalite.plan.layout import RankLayout
from megalite.plan.stage import StageSize, largest_layer, rank_size
from megalite.plan.tensors import LocalTensor, modules_of, tensors_of_rank

LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's default
LARGEST_PREFETCH = 50_000_000
LARGEST_PERSISTENT = 100_000
REDUCTION_PIECE = 2**19  # elements that ZeRO-3 exchanges at a time on a CPU: see training/reduction.py


def bucket_sizes(layout: RankLayout) -> dict[str, int]:
    """`zero_optimization` of the DeepSpeed JSON, in elements: what it says, else by the largest layer.

    A bucket takes the gradients of one decoder layer; larger tensors, of embedding and head, are reduced as
    they are. Vectors stay gathered under ZeRO-3. Where weights are gathered for each micro batch, they are
    until a bucket of them is there beside a module's: each module would else ask for a bucket more.
    """
    sizes = collective_sizes(layout.run, layout.deepspeed, rank_size(layout.run, layout.shares))
    if layout.deepspeed.zero_stage == 3 and layout.run.parallel.parameter_gathering == "micro_batch":
        sizes["stage3_max_live_parameters"] = live_elements(tensors_of_rank(layout), sizes)
    return sizes


def collective_sizes(run: RunConfig, deepspeed: DeepSpeedConfig, size: StageSize) -> dict[str, int]:
    """Those of them that say how much goes into one collective. size: of all that the rank holds."""
    stated: dict[str, Any] = deepspeed.raw.get("zero_optimization") or {}
    layer = max(1, largest_layer(run, size))  # of a stage without adapters nothing is trained
    chosen = {"reduce_bucket_size": min(layer, LARGEST_BUCKET)}
    if deepspeed.zero_stage == 3:
        chosen["stage3_prefetch_bucket_size"] = min(layer, LARGEST_PREFETCH)
        chosen["stage3_param_persistence_threshold"] = min(10 * run.model.hidden_size, LARGEST_PERSISTENT)
    sizes = {name: int(float(stated.get(name, elements))) for name, elements in chosen.items()}
    if sizes["reduce_bucket_size"] < 1:
        raise ConfigError(
            f"zero_optimization.reduce_bucket_size is {stated['reduce_bucket_size']} in the DeepSpeed JSON "
            "and at least 1 is needed: remove it, or state more"
        )
    return sizes


def live_elements(tensors: list[LocalTensor], sizes: Mapping[str, int]) -> int:
    """Elements that are whole at a time: vectors, a module's, and those that are gathered ahead."""
    threshold = sizes["stage3_param_persistence_threshold"]
    small = sum(tensor.numel for tensor in tensors if tensor.numel < threshold)
    module = max((sum(tensor.numel for tensor in module) for module in modules_of(tensors)), default=0)
    return small + module + sizes["stage3_prefetch_bucket_size"]
