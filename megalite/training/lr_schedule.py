"""The learning rate of each step (pure arithmetic)."""

from math import cos, pi

from megalite.config.optimizer import OptimizerConfig
from megalite.config.schedule import ScheduleConfig


def learning_rate_at(step: int, schedule: ScheduleConfig, optimizer: OptimizerConfig) -> float:
    """The learning rate that optimizer step `step` uses; steps count from 1.

    Linear warm-up reaches the peak at step `warmup_steps`, and the first step already learns. Then `cosine`
    (arXiv 1608.03983, no restarts) and `linear` fall to the minimum over `decay_steps`, or by the last step;
    `constant` stays; `wsd` (arXiv 2404.06395) stays and falls linearly over the last `decay_steps`.
    """
    peak, low = optimizer.learning_rate, schedule.min_learning_rate
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    start, length = decay_window(schedule)
    progress = min(max(step - start, 0) / length, 1.0)
    remaining = (1 + cos(pi * progress)) / 2 if schedule.decay == "cosine" else 1 - progress
    return low + (peak - low) * remaining


def decay_window(schedule: ScheduleConfig) -> tuple[int, int]:
    """The last step at the peak, and the number of steps from there to the minimum (at least 1)."""
    warmup, end = schedule.warmup_steps, schedule.num_steps
    if schedule.decay == "wsd":
        length = schedule.decay_steps or max(end // 10, 1)
        start = max(end - length, warmup)
        return start, max(end - start, 1)
    return warmup, schedule.decay_steps or max(end - warmup, 1)
