"""EleutherAI's lm-evaluation-harness; its only importer.

The harness scores text through transformers' own class of the model, so that a checkpoint gives the numbers
of its export.
"""

import difflib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from megalite.evaluation.record import EvaluationError, Measurement
from megalite.tokenizer.tokenizer import Tokenizer


class Harness:
    """The tasks that were asked for, ready to be run on any model.

    Args:
        names: of tasks, groups or tags of the harness.
        folders: further places with task files, which win over the harness's own.
        tasks_option, folder_option: where a person named the two, for the text of errors.

    Raises EvaluationError when the harness is not installed, a name is not known, or the data of a task
    cannot be had.
    """

    def __init__(
        self,
        names: Sequence[str],
        folders: Sequence[Path] = (),
        *,
        tasks_option: str = "--tasks",
        folder_option: str = "--include-path",
    ) -> None:
        self._tasks_option, self._folder_option = tasks_option, folder_option
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise EvaluationError(
                f"{tasks_option}: expected lm-evaluation-harness, found nothing: pip install 'megalite[eval]'"
            ) from None
        for folder in folders:
            if not folder.is_dir():
                raise EvaluationError(f"{folder_option}: there is no folder {folder}")
        self._manager = TaskManager(include_path=[str(folder) for folder in folders])
        for name in names:
            self._check_known(name)
        self._tasks = [task for name in names for task in self._load(name)]
        self._check_each_once()

    def run(
        self,
        model: Any,
        tokenizer: Tokenizer,
        *,
        num_fewshot: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
    ) -> list[Measurement]:
        """What every task and group measures of a model of transformers.

        num_fewshot: solved examples in each prompt, in place of each task's own number.
        limit: examples of each task; None for all.
        """
        from lm_eval import simple_evaluate

        with TemporaryDirectory() as folder:
            tokenizer.save(folder, model.config.max_position_embeddings)
            adapter = _adapter(model, folder, batch_size)
        with _random_states_kept():
            results = simple_evaluate(
                model=adapter,
                tasks=self._tasks,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=False,
                task_manager=self._manager,
            )
        return list(read_results(results))

    def _check_known(self, name: str) -> None:
        known = self._manager.all_tasks
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            meant = f"did you mean {' or '.join(near)}? " if near else ""
            remedy = f"`lm_eval ls tasks` lists all, {self._folder_option} adds more"
            raise EvaluationError(f"{self._tasks_option}: there is no task {name}: {meant}{remedy}")

    def _check_each_once(self) -> None:
        """The harness takes no task twice, and would say so when it is run."""
        try:
            self._manager.load(self._tasks)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise EvaluationError(f"{self._tasks_option}: {reason}: name each task once") from None

    def _load(self, name: str) -> list[Any]:
        """The group of a name, or its tasks, with their data."""
        from datasets.exceptions import DatasetsError

        try:
            loaded: Mapping[str, Any] = self._manager.load([name])
        except (OSError, DatasetsError) as error:
            reason = " ".join(str(error).split())
            raise EvaluationError(
                f"{self._tasks_option}: the data of {name} cannot be had: {reason}: a task of the harness "
                f"fetches it from the Hugging Face Hub once; without a network, name local tasks "
                f"with {self._folder_option}"
            ) from None
        groups = loaded["groups"]
        return [groups[name]] if name in groups else list(loaded["tasks"].values())


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """The harness seeds Python, NumPy and torch: what draws from them afterwards goes on as if it had not."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _adapter(model: Any, tokenizer: str, batch_size: int) -> Any:
    """The harness's view of a model in memory. tokenizer: a folder."""
    from lm_eval.models.huggingface import HFLM

    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that a model in memory ignores options that nobody gave
    try:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    finally:
        logger.setLevel(level)


def read_results(results: Mapping[str, Any]) -> Iterator[Measurement]:
    """The numbers in what the harness returns; keys there are `metric,filter` and `metric_stderr,filter`."""
    for task, numbers in results["results"].items():
        for key, value in numbers.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = numbers.get(f"{metric}_stderr,{kind}")
            samples = results.get("n-samples", {}).get(task, {})
            yield Measurement(
                task=task,
                metric=metric if kind == "none" else f"{metric} ({kind})",
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                num_fewshot=results["n-shot"].get(task),
                num_samples=samples.get("effective"),
            )
