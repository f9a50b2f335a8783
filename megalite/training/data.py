"""What a run reads, made ready: batches for this rank, and a record of where they come from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.data.corpus import prepare_default_data
from megalite.data.datasets import Datasets
from megalite.data.fingerprint import describe_data
from megalite.data.loader import Batches, BatchLoader, PreparedBatches, check_vocabulary
from megalite.parallel.context import ParallelContext
from megalite.tokenizer.load import load_tokenizer
from megalite.training.output import make_folder
from megalite.training.samples import build_samples, open_cache, token_files
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
    """The run with its data named, and the data of its task. Collective."""
    run = _with_data(run, context)
    datasets = build_samples(run, deepspeed.train_batch_size, open_cache(run), progress=progress)
    return run, _build_data(datasets, run, deepspeed, context)


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

    stages = context["pp"]
    ends = (0, stages.size - 1)

    def batches(dataset: Any) -> Batches:
        loader = BatchLoader(
            dataset,
            global_batch_samples=deepspeed.train_batch_size,
            num_micro_batches=deepspeed.num_micro_batches(context["dp"].size),
            dp_rank=context["dp"].rank,
            dp_size=context["dp"].size,
            vocab_size=run.model.vocab_size,
            mask_documents=run.data.mask_documents,
            reads_tokens=stages.rank in ends,
        )
        return PreparedBatches(loader)

    validation = batches(datasets.validation) if datasets.validation is not None else None
    return Data(batches(datasets.train), validation, describe_data(datasets))
