"""Pipeline schedules by name: the list of actions of one rank, ready for a runner to walk.

Nothing here communicates. Micro batches are numbered from 0.
"""

from dataclasses import replace

from megalite.pipeline.actions import Action, AnyBackward, Forward, ScheduleError
from megalite.pipeline.orders import RULES, Order, Rule
from megalite.pipeline.placement import Placement
from megalite.pipeline.transfers import with_transfers


def build_schedule(
    name: str, rank: int, num_ranks: int, num_micro_batches: int, num_chunks: int | None = None
) -> list[Action]:
    """The training actions of one rank, by the name of the schedule.

    num_chunks: of layers per rank; by default the fewest that the schedule has.
    """
    orders, placement = orders_of(name, num_ranks, num_micro_batches, num_chunks)
    _check_rank(rank, num_ranks)
    return with_last_backward(with_transfers(orders, placement)[rank])


def orders_of(
    name: str, num_ranks: int, num_micro_batches: int, num_chunks: int | None = None
) -> tuple[list[Order], Placement]:
    """What each rank computes, and where the stages lie."""
    rule, placement = rule_of(name), placement_of(name, num_ranks, num_chunks)
    if num_micro_batches < 1:
        raise ScheduleError(f"a step of {num_micro_batches} micro batches trains nothing: give at least 1")
    sizes = num_ranks, num_micro_batches, placement.num_chunks
    return [rule.order(rank, *sizes) for rank in range(num_ranks)], placement


def forward_only(rank: int, placement: Placement, num_micro_batches: int) -> list[Action]:
    """Forwards alone, for evaluation: as many micro batches as ranks pass a chunk, then the next."""
    _check_rank(rank, placement.num_ranks)
    if num_micro_batches < 0:
        raise ScheduleError(f"the number of micro batches is {num_micro_batches}: it cannot be negative")
    order = [
        Forward(i, chunk)
        for first in range(0, num_micro_batches, placement.num_ranks)
        for chunk in range(placement.num_chunks)
        for i in range(first, min(first + placement.num_ranks, num_micro_batches))
    ]
    return with_transfers([order] * placement.num_ranks, placement)[rank]


def rule_of(name: str) -> Rule:
    """A schedule's rule; ScheduleError for a name that is none."""
    if name not in RULES:
        known = ", ".join(sorted(RULES))
        raise ScheduleError(f"pipeline_schedule {name!r} is unknown: choose one of {known}")
    return RULES[name]


def placement_of(name: str, num_ranks: int, num_chunks: int | None = None) -> Placement:
    """How a schedule's stages lie on ranks; ScheduleError for a number of chunks that it does not have."""
    rule = rule_of(name)
    fewest = rule.num_chunks or 2
    chosen = fewest if num_chunks is None else num_chunks
    if chosen < fewest or (rule.num_chunks and chosen != fewest):
        wanted = str(fewest) if rule.num_chunks else "2 or more"
        raise ScheduleError(
            f"parallel.num_chunks is {chosen} and pipeline_schedule {name} has {wanted}: "
            f"set parallel.num_chunks={fewest}, or choose another schedule"
        )
    return Placement(num_ranks, chosen, rule.is_v)


def with_last_backward(actions: list[Action]) -> list[Action]:
    """The actions with the last backward marked: after it gradients are to be whole."""
    last = max((i for i, action in enumerate(actions) if isinstance(action, AnyBackward)), default=None)
    return [
        replace(action, is_last=i == last) if isinstance(action, AnyBackward) else action
        for i, action in enumerate(actions)
    ]


def _check_rank(rank: int, num_ranks: int) -> None:
    if not 0 <= rank < num_ranks:
        raise ScheduleError(f"rank {rank} does not exist in a pipeline of {num_ranks}: ranks count from 0")
