"""What the weights that a run starts with think of its pairs: computed once, and kept beside the data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megalite.data.chat_loader import ChatLoader
from megalite.files import written_aside
from megalite.training.trainer import StageTrainer
from megalite.training.world import on_rank_0


def find_references(
    file: Path,
    loader: ChatLoader,
    trainer: StageTrainer,
    start: Callable[[], object],
    report: Callable[[str], None],
) -> np.ndarray:
    """fp32 [pairs, 2], of chosen and rejected; collective.

    loader: of each pair once, in order. start: fills the trainer with the weights that the run starts with,
        called where the file is not there.
    """
    rank = trainer.context.rank
    if not on_rank_0(rank, file.exists):
        start()
        report(f"log-probabilities of {loader.dataset.num_items:,} pairs under the weights at the start")
        found = compute_references(loader, trainer)
        on_rank_0(rank, lambda: _save(file, found))
    return np.load(file)


def compute_references(loader: ChatLoader, trainer: StageTrainer) -> np.ndarray:
    """By forward passes in the run's own layout; the same on every rank."""
    context, num_samples = trainer.context, len(loader.dataset)
    rows = torch.zeros(num_samples, 2, dtype=torch.float64, device=context.device)
    for consumed in range(0, num_samples, loader.global_batch_samples):
        log_p = trainer.score(loader.batch(consumed))
        if log_p is not None and context["tp"].rank == 0:
            positions = loader.positions(consumed)
            rows[positions.start : positions.stop] = log_p.view(-1, 2).to(rows.dtype)
    dist.all_reduce(rows)
    return rows[: loader.dataset.num_items].to(torch.float32).cpu().numpy()


def _save(file: Path, references: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(file, "wb") as stream:
        np.save(stream, references)
