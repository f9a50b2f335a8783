"""Tasks of lm-evaluation-harness on the model in training."""

from collections.abc import Callable
from pathlib import Path

from megalite.checkpoint.hf_config import hf_config
from megalite.config.run import RunConfig
from megalite.evaluation.harness import Harness
from megalite.evaluation.record import EvaluationError, Measurement, format_table
from megalite.tokenizer.load import load_tokenizer
from megalite.training.live_model import LiveModel, Logits
from megalite.training.trainer import StageTrainer
from megalite.training.world import on_rank_0


class LiveEvaluation:
    """What a run is evaluated on while it goes on; the harness is on rank 0 alone. Collective.

    Raises JobError on all ranks, before anything is trained, when the harness, a task, its data or a
    tokenizer with an end of text is missing.
    """

    def __init__(self, run: RunConfig, rank: int, report: Callable[[str], None]) -> None:
        self.run, self.rank, self.report = run, rank, report
        on_rank_0(rank, self._open)

    def _open(self) -> None:
        options = self.run.logging
        folders = [Path(options.evaluate_task_folder)] if options.evaluate_task_folder else []
        self.harness = Harness(options.evaluate_tasks, folders)
        assert self.run.data.tokenizer is not None
        self.tokenizer = load_tokenizer(self.run.data.tokenizer)
        if self.tokenizer.eos_token is None:
            raise EvaluationError(
                f"logging.evaluate_tasks: tokenizer {self.tokenizer.name} has no end of text, which the "
                "harness needs: choose another data.tokenizer, or set logging.evaluate_every_steps=0"
            )

    def __call__(self, trainer: StageTrainer) -> dict[str, float]:
        """Its numbers on rank 0, as `evaluation/TASK/METRIC`."""
        found = LiveModel(trainer).lead(lambda logits: self._measure(trainer, logits)) or []
        if found:
            self.report(format_table(found))
        return {f"evaluation/{row.task}/{row.metric}": row.value for row in found}

    def _measure(self, trainer: StageTrainer, logits: Logits) -> list[Measurement]:
        from megalite.evaluation.live import LiveCausalLM  # takes transformers, which takes seconds

        model = self.run.model
        if model.eos_token_id is None:
            model = model.model_copy(update={"eos_token_id": self.tokenizer.eos_token_id})
        context = trainer.context
        live = LiveCausalLM(hf_config(model, "float32"), logits, context.device)
        options = self.run.logging
        return self.harness.run(
            live,
            self.tokenizer,
            num_fewshot=options.evaluate_fewshot,
            limit=options.evaluate_limit,
            batch_size=trainer.batch_samples,
        )
