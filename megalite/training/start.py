"""The weights that a run begins with: another run's checkpoint, or a Hugging Face folder, imported once."""

from collections.abc import Callable
from pathlib import Path

from megalite.checkpoint.format import CheckpointError, list_steps
from megalite.checkpoint.hf import import_folder
from megalite.checkpoint.hf_folder import CONFIG_FILE, HFFolder
from megalite.checkpoint.load import find_checkpoint, newest_checkpoint, read_config, require_checkpoint
from megalite.config.checkpoint import CheckpointConfig
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from megalite.config.section import ConfigError
from megalite.training.world import on_rank_0


def with_model_of_start(run: RunConfig) -> RunConfig:
    """A run that begins with a model, with that model's shape and tokenizer where it states none.

    Raises ConfigError for a run that begins with none, CheckpointError for a start that cannot be read.
    """
    if run.checkpoint.start_from is None:
        raise ConfigError(
            "this launcher goes on with a model that is there, and checkpoint.start_from is null: name a "
            "run's folder, its checkpoints, or a Hugging Face folder"
        )
    model, tokenizer = _describe_start(Path(run.checkpoint.start_from))
    if "model" not in run.model_fields_set:
        run = run.model_copy(update={"model": model})
    if run.data.tokenizer is None:
        run = run.model_copy(update={"data": run.data.model_copy(update={"tokenizer": tokenizer})})
    return run


def _describe_start(source: Path) -> tuple[ModelConfig, str | None]:
    """Shape and tokenizer; no tensor is read."""
    if not (source / CONFIG_FILE).exists():
        checkpoint = newest_checkpoint(source) or require_checkpoint(source, setting="checkpoint.start_from")
        run = read_config(checkpoint)
        return run.model, run.data.tokenizer
    folder = HFFolder(source)
    return folder.model, folder.tokenizer


def find_start(source: str, output_dir: str, rank: int, report: Callable[[str], None]) -> Path:
    """Where the checkpoint is that checkpoint.start_from means; collective on all ranks.

    A Hugging Face folder is imported into RUN_DIR/start by rank 0, the first time. What becomes of the folder
    later has no part in the run.
    """
    return on_rank_0(rank, lambda: _find_or_import(Path(source), Path(output_dir), report))


def _find_or_import(source: Path, output_dir: Path, report: Callable[[str], None]) -> Path:
    if not (source / CONFIG_FILE).exists():
        return source
    start = output_dir / "start"
    if list_steps(start):
        _check_made_of(source, start, report)
        return start
    folder = HFFolder(source)
    made_of = CheckpointConfig(start_from=str(source.resolve()))
    run = RunConfig(model=folder.model, checkpoint=made_of, output_dir=str(output_dir))
    report(f"imports {source} into {start}")
    import_folder(folder, start, run)
    return start


def _check_made_of(source: Path, start: Path, report: Callable[[str], None]) -> None:
    checkpoint = find_checkpoint(start, report)
    made_of = read_config(checkpoint).checkpoint.start_from if checkpoint else None
    if made_of != str(source.resolve()):
        raise CheckpointError(
            f"{start} was made of {made_of} and checkpoint.start_from is {source}: remove {start}, or choose "
            "another output_dir"
        )
