"""The model that is evaluated: a checkpoint's or a Hugging Face folder's, in the memory of one process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.checkpoint.format import MANIFEST, folder_step
from megalite.checkpoint.hf_folder import CONFIG_FILE
from megalite.checkpoint.load import read_config, require_checkpoint
from megalite.checkpoint.model import build_transformers_model, read_transformers_model
from megalite.checkpoint.tensor_file import hash_file
from megalite.checkpoint.weights import Weights
from megalite.evaluation.record import EvaluationError
from megalite.tokenizer.load import load_tokenizer
from megalite.tokenizer.tokenizer import Tokenizer

CHECKPOINTS = "checkpoints"  # in a run's folder


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        model: transformers', in evaluation mode.
        tokenizer: None where none is known.
        origin: of an Evaluation.
        run_folder: of the run that wrote the checkpoint; None where it is not in one.
    """

    model: Any
    tokenizer: Tokenizer | None
    origin: dict[str, Any]
    run_folder: Path | None = None


def open_subject(path: Path, tokenizer: str | None, dtype: str, report: Callable[[str], None]) -> Subject:
    """Read a model and its tokenizer.

    path: a run's folder, its checkpoints (the newest valid one is taken), one step of them, or a Hugging Face
        folder.
    tokenizer: in place of the run's or the folder's own.
    dtype: to compute in, and to round weights to: a key of DTYPES.

    Raises CheckpointError or TokenizerError when there is no such model or tokenizer, EvaluationError when
    they do not belong together.
    """
    path = Path(path)
    if (path / CHECKPOINTS).is_dir():
        path = path / CHECKPOINTS
    if (path / CONFIG_FILE).is_file():
        named = tokenizer or (str(path) if (path / "tokenizer.json").is_file() else None)
        opened = _open_tokenizer(named)
        subject = Subject(read_transformers_model(path, dtype), opened, {"path": str(path)})
    else:
        subject = _open_checkpoint(require_checkpoint(path, report), tokenizer, dtype)
    vocab_size = subject.model.config.vocab_size
    if subject.tokenizer is not None and subject.tokenizer.vocab_size > vocab_size:
        raise EvaluationError(
            f"tokenizer {subject.tokenizer.name} has {subject.tokenizer.vocab_size} ids and the model "
            f"{vocab_size}: name the one that it was trained with (--tokenizer)"
        )
    return subject


def _open_checkpoint(checkpoint: Path, tokenizer: str | None, dtype: str) -> Subject:
    run = read_config(checkpoint)
    opened = _open_tokenizer(tokenizer or run.data.tokenizer)
    origin = {
        "path": str(checkpoint),
        "step": folder_step(checkpoint),
        "manifest_sha256": hash_file(checkpoint / MANIFEST),
    }
    config = run.model
    if config.eos_token_id is None and opened is not None and opened.eos_token is not None:
        config = config.model_copy(update={"eos_token_id": opened.eos_token_id})  # as its export has it
    model = build_transformers_model(Weights(checkpoint, config, dtype)).eval()
    return Subject(model, opened, origin, run_folder_of(checkpoint))


def _open_tokenizer(name: str | None) -> Tokenizer | None:
    return None if name is None else load_tokenizer(name)


def run_folder_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a step's folder lies in."""
    parent = checkpoint.resolve().parent
    return parent.parent if parent.name == CHECKPOINTS else None
