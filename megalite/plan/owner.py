"""Who keeps which state of a model under ZeRO (Rajbhandari 2019, arXiv 1910.02054), in bytes of one rank.

DeepSpeed 0.19.8, with the masters that megalite/training/masters.py shares:

              weights          master copy               gradients                   moments
    ZeRO 0    all              the weights               all                         all
    ZeRO 1    all              a part; of fp32 shared    all in a step, and a part   a part
    ZeRO 2    all              a part; of fp32 shared    a part                      a part
    ZeRO 3    a part           a part; of fp32 shared    a part                      a part
"""

from math import ceil

from megalite.optimizer.kinds import kinds_of
from megalite.plan.layout import RankLayout
from megalite.plan.tensors import LocalTensor


def state_bytes(layout: RankLayout, tensors: list[LocalTensor]) -> dict[str, int]:
    """Weights, master copy, gradients and moments, by name."""
    trained = [tensor for tensor in tensors if tensor.is_trained]
    stage, precision = layout.deepspeed.zero_stage, layout.deepspeed.precision
    weights = sum(_part(t) if stage == 3 else t.numel for t in tensors) * layout.number_bytes
    stepped = sum(_part(t) if stage else t.numel for t in trained)
    masters = 4 * stepped if precision != "fp32" else 0
    kinds = [len(kinds_of(layout.run.optimizer.name, t.row.name, t.row.shape)) for t in trained]
    moments = 4 * sum(
        (_part(t) if stage else t.numel) * number for t, number in zip(trained, kinds, strict=True)
    )
    return {
        "weights": weights,
        "master copy": masters,
        "gradients": _gradients(layout, trained, stepped),
        "moments": moments,
    }


def _gradients(layout: RankLayout, trained: list[LocalTensor], stepped: int) -> int:
    """From the first backward of a step to its end."""
    stage = layout.deepspeed.zero_stage
    whole = sum(tensor.numel for tensor in trained)
    if stage == 0:
        return whole * layout.number_bytes
    if stage == 1:  # all ranks sum their own over micro batches, then have a part of the sum
        return whole * layout.gradient_bytes
    return stepped * layout.gradient_bytes


def reduces_in_the_end(layout: RankLayout) -> bool:
    """Whether all gradients are reduced at once, after the last backward: ZeRO-0, and BF16_Optimizer."""
    stage, sums_apart = layout.deepspeed.zero_stage, layout.gradient_bytes != layout.number_bytes
    return stage == 0 or (stage == 1 and layout.deepspeed.precision == "bf16" and sums_apart)


def gradients_are_let_go(layout: RankLayout) -> bool:
    """Whether each step makes all of them anew: ZeRO 0 and 1, unless they are summed in another format."""
    return layout.deepspeed.zero_stage < 2 and layout.gradient_bytes == layout.number_bytes


def _part(tensor: LocalTensor) -> int:
    return ceil(tensor.numel / tensor.num_data_ranks)
