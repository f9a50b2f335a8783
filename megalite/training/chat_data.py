"""Conversations and pairs as a run reads them: opened, put in order, and cut into batches."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.data.chat import ChatData, cache_beside_source, open_chat
from megalite.data.chat_loader import ChatLoader
from megalite.data.chat_samples import ChatSamples, Kind
from megalite.data.error import DataError
from megalite.data.packing import SampleOrder
from megalite.data.unpaired_loader import UnpairedLoader
from megalite.parallel.context import ParallelContext
from megalite.tokenizer.load import load_tokenizer
from megalite.tokenizer.template import open_template
from megalite.training.samples import slices_of
from megalite.training.world import on_rank_0


def kind_of(run: RunConfig) -> Kind:
    """What a run learns from."""
    if run.task != "prefer":
        return "conversations"
    return "unpaired" if run.preference.loss == "kto" else "pairs"


def open_sources(
    run: RunConfig, sources: list[str], rank: int, report: Callable[[str], None], progress: bool
) -> ChatData:
    """The sources of a run's task, prepared by rank 0 and then found in the cache. Collective.

    Raises DataError or TokenizerError for sources, a template or a tokenizer that cannot serve.
    """
    if run.data.tokenizer is None:
        raise DataError(
            "data.tokenizer is null and the model that the run starts from has none: name its tokenizer"
        )
    tokenizer = load_tokenizer(run.data.tokenizer)
    prepare = partial(
        open_chat,
        kind_of(run),
        sources,
        tokenizer,
        open_template(tokenizer, run.data.chat_template),
        seq_length=run.data.seq_length,
        cache_dir=run.data.cache_dir,
    )
    on_rank_0(rank, lambda: len(prepare(report=report, progress=progress)))
    return prepare()


def training_samples(chat: ChatData, run: RunConfig, num_samples: int) -> ChatSamples:
    """So many samples, each epoch in another order."""
    packing = run.data.packing and run.task != "prefer"
    order = SampleOrder(run.data.seq_length, run.seed, packing=packing, shuffle=True)
    return chat.samples(order, num_samples)


def validation_samples(chat: ChatData, run: RunConfig, batch_samples: int) -> ChatSamples:
    """Samples for one validation, in order; the first ones again where there are too few."""
    order = SampleOrder(run.data.seq_length, run.seed, packing=False, shuffle=False)
    return chat.samples(order, run.logging.validation_steps * batch_samples)


def build_loader(
    samples: ChatSamples,
    run: RunConfig,
    deepspeed: DeepSpeedConfig,
    context: ParallelContext,
    references: np.ndarray | None = None,
) -> ChatLoader:
    """This rank's part of each global batch."""
    loader = UnpairedLoader if samples.kind == "unpaired" else ChatLoader
    return loader(samples, references=references, **slices_of(run, deepspeed, context))


def reference_samples(samples: ChatSamples, batch_samples: int) -> ChatSamples:
    """What needs a reference: of pairs each one once; of single answers the samples themselves.

    For which answers meet in a mismatched row depends on the batch that they are in.
    """
    if samples.kind == "unpaired":
        return samples
    return ChatData(samples.sources, None, samples.kind).once(samples.order.seq_length, batch_samples)


def references_file(loader: ChatLoader, run: RunConfig, start: str, precision: str) -> Path:
    """Where log-probabilities are kept, beside the data; its name says all that they follow from.

    start: a fingerprint of the weights of the start. precision: that they are computed in.
    """
    samples = loader.dataset
    made_from: list[Any] = [start, run.model.model_dump(), precision]
    made_from += [samples.order.seq_length, [source.sha256 for source in samples.sources]]
    if samples.kind == "unpaired":
        made_from += [samples.weights, samples.order, len(samples), loader.global_batch_samples]
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    folder = run.data.cache_dir or cache_beside_source(samples.sources[0].name)
    return Path(folder) / f"references-{key}.npy"
