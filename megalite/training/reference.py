"""What the weights that a run starts with think of its answers: computed once, and kept beside the data."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megalite.batch import Batch
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
    """fp32 [pairs, 2], of chosen and rejected, or [samples, 2], of answers and mismatched rows; collective.

    loader: of each pair once, in order, or of all samples of single answers.
    start: fills the trainer with the weights that the run starts with, called where the file is not there.
    """
    rank = trainer.context.rank
    if not on_rank_0(rank, file.exists):
        start()
        noun = "pairs" if loader.dataset.kind == "pairs" else "answers, each twice,"
        report(f"log-probabilities of {loader.num_references:,} {noun} under the weights at the start")
        found = compute_references(loader, trainer)
        on_rank_0(rank, lambda: _save(file, found))
    return np.load(file)


def compute_references(loader: ChatLoader, trainer: StageTrainer) -> np.ndarray:
    """By forward passes in the run's own layout; the same on every rank."""
    context, num_samples = trainer.context, len(loader.dataset)
    rows = torch.zeros(num_samples, 2, dtype=torch.float64, device=context.device)
    for consumed in range(0, num_samples, loader.global_batch_samples):
        log_p = _two_of_each(loader.batch(consumed), trainer)
        if log_p is not None and context["tp"].rank == context["cp"].rank == 0:
            positions = loader.positions(consumed)
            rows[positions.start : positions.stop] = log_p.to(rows.dtype)
    dist.all_reduce(rows)
    return rows[: loader.num_references].to(torch.float32).cpu().numpy()


def _two_of_each(batches: Sequence[Batch], trainer: StageTrainer) -> torch.Tensor | None:
    """Log-probabilities [n, 2] of both rows of each pair, or of each row and its mismatched one."""
    log_p = trainer.score(batches)
    mismatched = [batch.mismatched for batch in batches if batch.mismatched is not None]
    others = trainer.score(mismatched) if mismatched else None
    if log_p is None:
        return None
    return log_p.view(-1, 2) if others is None else torch.stack([log_p, others], dim=1)


def _save(file: Path, references: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(file, "wb") as stream:
        np.save(stream, references)
