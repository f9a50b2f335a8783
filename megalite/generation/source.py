"""The model that writes, from wherever its weights lie: a checkpoint, a Hugging Face folder, an adapter."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megalite.checkpoint.adapter import open_weights
from megalite.checkpoint.foreign_reader import merge_folder, read_folder
from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.hf_folder import CONFIG_FILE, HFFolder, tokenizer_in
from megalite.checkpoint.load import PLACES, TensorReader, read_config, require_checkpoint
from megalite.checkpoint.model import load_stage
from megalite.checkpoint.peft_folder import ADAPTER_CONFIG, PeftFolder
from megalite.checkpoint.weights import DTYPES
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from megalite.generation.place import Place
from megalite.model.decoding import decoding_context
from megalite.model.llama import LlamaStage
from megalite.parallel.plan import LayerPlan

SOURCES = f"{PLACES}; or a folder of Hugging Face's, of a model or an adapter"


@dataclass(frozen=True)
class Source:
    """A model whose weights have not been read.

    Attributes:
        path: of the folder.
        model: its shape.
        tokenizer: name of the one that it was trained with; None where none is known.
        chat_template: name of the one that it was trained with; None for the tokenizer's own, if it has one.
        open_reader: what reads its weights from `path`.
    """

    path: Path
    model: ModelConfig
    tokenizer: str | None
    chat_template: str | None
    open_reader: Callable[[Path], TensorReader]

    def load(self, dtype: str, place: Place) -> LlamaStage:
        """The part of it that a process holds. dtype: to compute in, a key of DTYPES.

        Raises ConfigError when it cannot be cut over so many processes, CheckpointError as `load_stage`.
        """
        RunConfig(model=self.model).check_tensor_parallel(place.world_size)
        context = decoding_context(self.model, place.device, place.rank, place.world_size)
        plan = LayerPlan(context, dtype=DTYPES[dtype])
        return load_stage(self.path, self.model, plan, place.gather, self.open_reader)


def open_source(path: Path, base: Path | None, report: Callable[[str], None], place: Place) -> Source:
    """What lies at a path; all processes of the place ask together.

    path: one of SOURCES.
    base: of an adapter in PEFT's format: one of SOURCES in the place of the one that it names.

    Raises CheckpointError when there is no model, or an adapter's base is not here.
    """
    if (path / ADAPTER_CONFIG).exists():
        folder = PeftFolder(path)
        return _with_adapter(open_source(base or _base_folder(folder), None, report, place), folder)
    if base is not None:
        raise CheckpointError(
            f"--base is {base} and {path} has no {ADAPTER_CONFIG}: leave --base out, which only an adapter "
            "of PEFT's format has"
        )
    if (path / CONFIG_FILE).exists():
        model = HFFolder(path)
        return Source(path, model.model, model.tokenizer, None, lambda path: read_folder(HFFolder(path)))
    checkpoint = require_checkpoint(
        path, report, rank=place.rank, world_size=place.world_size, gather=place.gather
    )
    run = read_config(checkpoint)
    return Source(checkpoint, run.model, run.data.tokenizer, run.data.chat_template, open_weights)


def _with_adapter(base: Source, folder: PeftFolder) -> Source:
    """A base as an adapter changes it. A tokenizer beside the adapter comes before the base's."""
    tokenizer, template = base.tokenizer, base.chat_template
    if own := tokenizer_in(folder.path):
        tokenizer, template = own, None
    return Source(base.path, base.model, tokenizer, template, partial(_open_merged, base, folder))


def _open_merged(base: Source, folder: PeftFolder, path: Path) -> TensorReader:
    return merge_folder(base.open_reader(path), folder)


def _base_folder(folder: PeftFolder) -> Path:
    if folder.base is None or not Path(folder.base).is_dir():
        raise CheckpointError(
            f"{folder.path} is an adapter of {folder.base}, which is no folder here: name it with --base"
        )
    return Path(folder.base)
