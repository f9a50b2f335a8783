"""What a run reads, made ready: batches for this rank, and a record of where they come from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.data.blend import BlendedDataset
from megalite.data.chat_loader import ChatLoader
from megalite.data.chat_samples import ChatDatasets, ChatSamples
from megalite.data.corpus import prepare_default_data
from megalite.data.datasets import Datasets
from megalite.data.error import DataError
from megalite.data.fingerprint import check_same_data, describe_data, differences
from megalite.data.loader import Batches, BatchLoader, PreparedBatches, check_vocabulary
from megalite.data.past import Past
from megalite.parallel.context import ParallelContext
from megalite.tokenizer.load import load_tokenizer
from megalite.training.chat_data import (
    build_loader,
    open_sources,
    reference_samples,
    references_file,
    training_samples,
    validation_samples,
)
from megalite.training.checkpoints import Checkpoints, Newest
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
    num_samples: int,
    newest: Newest,
    report: Callable[[str], None],
    progress: bool = False,
) -> tuple[RunConfig, Data]:
    """The run with its data named, and the data of its task, so many samples to train on. Collective.

    Preferences that need a reference get it later, see `with_references`.

    newest: the checkpoint that the run goes on from. DataError where its place in these data is not known.
    """
    where = str(newest.folder)
    state = {} if run.data.allow_other_data else newest.state
    if run.task != "pretrain":
        data = _open_chat(run, deepspeed, context, num_samples, report, progress)
        check_same_data(state.get("data", {}), data.description, where)
        return run, data
    run = _with_data(run, context)
    cache, past = open_cache(run), Past.of(state, where)
    datasets = build_samples(run, deepspeed.train_batch_size, cache, progress, num_samples, past)
    data = _build_data(datasets, run, deepspeed, context)
    if past is not None:
        _tell_blend(datasets, past, report)
        _check_validation(run, state["data"], data.description, where, report)
    return run, data


def _tell_blend(datasets: Datasets, past: Past, report: Callable[[str], None]) -> None:
    """Where a blend begins: how far each of its datasets, and of those that it leaves, was read."""
    train = datasets.train
    if not isinstance(train, BlendedDataset) or train.before.samples != past.consumed_samples:
        return
    rows = zip(train.datasets, train.before.read, strict=True)
    told = [
        f"{dataset.indexed.prefix} goes on after {read:,}" if read else f"{dataset.indexed.prefix} begins"
        for dataset, read in rows
    ]
    told += [f"{row['prefix']} has ended after {row['read']:,}" for row in train.before.former]
    report(f"another blend of data.train after {train.before.samples:,} samples: " + ", ".join(told))


def _check_validation(
    run: RunConfig,
    recorded: Mapping[str, Any],
    found: Mapping[str, Any],
    where: str,
    report: Callable[[str], None],
) -> None:
    """Other validation data change nothing that is learnt, but their losses are not to be compared."""
    before, now = ({"validation": one.get("validation", [])} for one in (recorded, found))
    difference = next(differences(before, now), None) if all(before.values()) and all(now.values()) else None
    if difference is None:
        return
    if run.checkpoint.keep_best:
        raise DataError(
            f"checkpoint.keep_best {run.checkpoint.keep_best} compares validation losses, and the validation "
            f"data are not those of {where}: {difference}: name those, or set checkpoint.keep_best=0"
        )
    report(f"validation losses are of other data than before {where}: {difference}")


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
    if run.task != "prefer" or run.preference.loss == "simpo":
        return data
    fingerprint = checkpoints.start_fingerprint()

    def with_own(batches: Batches) -> Batches:
        assert isinstance(batches, PreparedBatches) and isinstance(batches.loader, ChatLoader)
        samples = batches.loader.dataset
        asked = reference_samples(samples, deepspeed.train_batch_size)
        loader = build_loader(asked, run, deepspeed, trainer.context)
        found = find_references(
            references_file(loader, run, fingerprint, deepspeed.precision),
            loader,
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
    num_samples: int,
    report: Callable[[str], None],
    progress: bool,
) -> Data:
    if run.data.train is None:
        raise DataError(f"data.train is null, and {run.task} needs conversations or pairs: name a file")
    chat = open_sources(run, run.data.train, context.rank, report, progress)
    train = training_samples(chat, run, num_samples)
    validation = None
    if run.data.validation is not None and run.logging.validate_every_steps:
        chat = open_sources(run, run.data.validation, context.rank, report, progress)
        validation = validation_samples(chat, run, deepspeed.train_batch_size)

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
