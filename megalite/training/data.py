"""What a run reads, made ready: batches for this rank, and a record of where they come from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.data.chat import ChatData
from megalite.data.chat_loader import ChatLoader
from megalite.data.chat_samples import ChatDatasets, ChatSamples
from megalite.data.corpus import prepare_default_data
from megalite.data.datasets import Datasets
from megalite.data.error import DataError
from megalite.data.fingerprint import describe_data
from megalite.data.loader import Batches, BatchLoader, PreparedBatches, check_vocabulary
from megalite.parallel.context import ParallelContext
from megalite.tokenizer.load import load_tokenizer
from megalite.training.chat_data import (
    build_loader,
    open_sources,
    references_file,
    training_samples,
    validation_samples,
)
from megalite.training.checkpoints import Checkpoints
from megalite.training.output import make_folder
from megalite.training.reference import find_references
from megalite.training.samples import build_samples, open_cache, slices_of, token_files
from megalite.training.trainer import StageTrainer
from megalite.training.world import on_rank_0

DEFAULT_CORPUS_BYTES = 8 << 20


@dataclass(frozen=True)
class Data:
    """Where batches come from; validation may be absent.

    description: of the files and the order of their samples, for checkpoints.
    """

    train: Batches
    validation: Batches | None
    description: Mapping[str, Any]


def open_data(
    run: RunConfig,
    deepspeed: DeepSpeedConfig,
    context: ParallelContext,
    report: Callable[[str], None],
    progress: bool = False,
) -> tuple[RunConfig, Data]:
    """The run with its data named, and the data of its task. Collective.

    Preferences that need a reference get it later, see `with_references`.
    """
    if run.task != "pretrain":
        return run, _open_chat(run, deepspeed, context, report, progress)
    run = _with_data(run, context)
    datasets = build_samples(run, deepspeed.train_batch_size, open_cache(run), progress=progress)
    return run, _build_data(datasets, run, deepspeed, context)


def with_references(
    data: Data,
    run: RunConfig,
    deepspeed: DeepSpeedConfig,
    trainer: StageTrainer,
    checkpoints: Checkpoints,
    report: Callable[[str], None],
) -> Data:
    """The data of a run that measures preferences against its start, with what that makes of each pair.

    Collective. The trainer may hold the weights of the start afterwards: they are to be resumed after this.
    """
    if run.task != "prefer" or run.preference.loss != "dpo":
        return data
    fingerprint = checkpoints.start_fingerprint()

    def with_own(batches: Batches) -> Batches:
        assert isinstance(batches, PreparedBatches) and isinstance(batches.loader, ChatLoader)
        samples = batches.loader.dataset
        chat = ChatData(samples.sources, None, samples.sequences_per_item)
        once = chat.once(run.data.seq_length, deepspeed.train_batch_size)
        found = find_references(
            references_file(chat, run, fingerprint),
            build_loader(once, run, deepspeed, trainer.context),
            trainer,
            lambda: checkpoints.start(trainer.engine),
            report,
        )
        return PreparedBatches(build_loader(samples, run, deepspeed, trainer.context, found))

    validation = None if data.validation is None else with_own(data.validation)
    return Data(with_own(data.train), validation, data.description)


def _open_chat(
    run: RunConfig,
    deepspeed: DeepSpeedConfig,
    context: ParallelContext,
    report: Callable[[str], None],
    progress: bool,
) -> Data:
    if run.data.train is None:
        raise DataError(f"data.train is null, and {run.task} needs conversations or pairs: name a file")
    batch_samples = deepspeed.train_batch_size
    train = training_samples(
        open_sources(run, run.data.train, context.rank, report, progress), run, batch_samples
    )
    validation = None
    if run.data.validation is not None and run.logging.validate_every_steps:
        chat = open_sources(run, run.data.validation, context.rank, report, progress)
        validation = validation_samples(chat, run, batch_samples)

    def batches(samples: ChatSamples) -> PreparedBatches:
        return PreparedBatches(build_loader(samples, run, deepspeed, context))

    description = describe_data(ChatDatasets(train, validation))
    return Data(batches(train), None if validation is None else batches(validation), description)


def _with_data(run: RunConfig, context: ParallelContext) -> RunConfig:
    """The run with its default data made and named, where it names none."""
    if run.data.train is not None:
        return run

    def prepare() -> str:
        folder = make_folder(run.output_dir)
        return prepare_default_data(folder / "data", load_tokenizer("bytes"), DEFAULT_CORPUS_BYTES)

    prefix = on_rank_0(context.rank, prepare)
    data = run.data.model_copy(update={"train": [prefix], "tokenizer": "bytes"})
    return run.model_copy(update={"data": data})


def _build_data(
    datasets: Datasets, run: RunConfig, deepspeed: DeepSpeedConfig, context: ParallelContext
) -> Data:
    def check_ids() -> None:
        for indexed in token_files(datasets):
            check_vocabulary(indexed, run.model.vocab_size)

    on_rank_0(context.rank, check_ids)

    slices = slices_of(run, deepspeed, context)

    def batches(dataset: Any) -> Batches:
        loader = BatchLoader(dataset, mask_documents=run.data.mask_documents, **slices)
        return PreparedBatches(loader)

    validation = batches(datasets.validation) if datasets.validation is not None else None
    return Data(batches(datasets.train), validation, describe_data(datasets))
