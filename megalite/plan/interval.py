"""What checkpoints of a run cost, and how often to write one on a machine that fails (no torch)."""

from dataclasses import dataclass
from math import prod, sqrt

from megalite.model.table import adapter_table, model_table
from megalite.plan.job import Job


@dataclass(frozen=True)
class CheckpointPlan:
    """Of a run's full state.

    Attributes:
        size_bytes: of one checkpoint: fp32 masters and the optimizer's state (docs/checkpoint_format.md).
        write_seconds: by all nodes together.
        hours_between_failures: of the whole job.
        interval_seconds: between checkpoints, by Daly's rule.
        lost_fraction: of the time, to writing and to work done again, at that interval.
    """

    size_bytes: int
    write_seconds: float
    hours_between_failures: float
    interval_seconds: float
    lost_fraction: float


def checkpoint_plan(job: Job) -> CheckpointPlan:
    """Size, time and interval of a run's checkpoints."""
    size_bytes = checkpoint_bytes(job)
    device = job.device
    speed = min(device.storage_gb_per_second, device.storage_gb_per_second_per_node * job.num_nodes)
    write_seconds = size_bytes / (speed * 1e9)
    hours = device.hours_between_failures / job.world_size
    interval = daly_interval(write_seconds, hours * 3600)
    lost = write_seconds / interval + (interval + write_seconds) / 2 / (hours * 3600)
    return CheckpointPlan(size_bytes, write_seconds, hours, interval, lost)


def checkpoint_bytes(job: Job) -> int:
    """Of a full checkpoint: 4 per number, and 4 per kind of state of what is trained."""
    model, lora = job.run.model, job.run.lora
    rows = model_table(model)
    if lora.rank:  # the model itself is frozen, and not saved again
        return sum(12 * row.num_elements for row in adapter_table(model, lora.rank, lora.targets))
    is_muon = job.run.optimizer.name == "muon"
    moments = {row.name: 1 if is_muon and row.kind in ("matrix", "expert") else 2 for row in rows}
    return sum(4 * (1 + moments[row.name]) * prod(row.shape) for row in rows)


def young_interval(write_seconds: float, mean_seconds_between_failures: float) -> float:
    """Young 1974 (Communications of the ACM 17, 9): sqrt(2 d M)."""
    return sqrt(2 * write_seconds * mean_seconds_between_failures)


def daly_interval(write_seconds: float, mean_seconds_between_failures: float) -> float:
    """Daly 2006 (Future Generation Computer Systems 22, equation 37), the higher-order estimate.

    sqrt(2 d M) (1 + sqrt(d / 2M) / 3 + d / 18M) - d for d < 2M, else M.
    """
    d, mean = write_seconds, mean_seconds_between_failures
    if d >= 2 * mean:
        return mean
    ratio = d / (2 * mean)
    return young_interval(d, mean) * (1 + sqrt(ratio) / 3 + ratio / 9) - d
