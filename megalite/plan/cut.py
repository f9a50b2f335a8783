"""Which stage gets how many layers (pure arithmetic).

The head and the loss weigh as much as a layer or more, so that stages of equally many are not equal stages.
"""

from dataclasses import replace

from megalite.plan.job import Job
from megalite.plan.work import stage_seconds


def balanced_cut(job: Job) -> list[int]:
    """Layers of each stage, in the order of the model.

    From the job's own cut, one layer at a time goes from the rank that computes longest to the one that does
    least, as long as the ranks' times, the longest first, get shorter by it.
    """
    best = _layers(job)
    times = sorted(_rank_seconds(job), reverse=True)
    while True:
        moved = _with_one_moved(with_layers(job, best), best)
        if min(moved) < 1:
            return best
        then = sorted(_rank_seconds(with_layers(job, moved)), reverse=True)
        if then >= times:
            return best
        best, times = moved, then


def with_layers(job: Job, layers: list[int]) -> Job:
    """The job with so many layers in each stage."""
    parallel = job.run.parallel.model_copy(update={"layers_per_stage": layers})
    return replace(job, run=job.run.model_copy(update={"parallel": parallel}))


def _with_one_moved(job: Job, layers: list[int]) -> list[int]:
    """From the largest stage of the busiest rank to the smallest one of the idlest."""
    busy, placement = _rank_seconds(job), job.placement
    ranks = range(placement.num_ranks)
    giver, taker = max(ranks, key=busy.__getitem__), min(ranks, key=busy.__getitem__)
    of_giver, of_taker = (
        [placement.stage(rank, chunk) for chunk in range(placement.num_chunks)] for rank in (giver, taker)
    )
    moved = list(layers)
    moved[max(of_giver, key=layers.__getitem__)] -= 1
    moved[min(of_taker, key=layers.__getitem__)] += 1
    return moved


def _layers(job: Job) -> list[int]:
    placement = job.placement
    held = (placement.holder(stage) for stage in range(placement.num_stages))
    return [len(job.shares(rank)[chunk].layers) for rank, chunk in held]


def _rank_seconds(job: Job) -> list[float]:
    """That each rank computes, of one micro batch."""
    return [
        sum(stage_seconds(job, share).total for share in job.shares(rank))
        for rank in range(job.run.parallel.pp_size)
    ]
