"""Conversations and pairs as a run reads them: opened, put in order, and cut into batches."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.data.chat import ChatData, cache_beside_source, open_chat
from megalite.data.chat_loader import ChatLoader
from megalite.data.chat_samples import ChatSamples
from megalite.data.error import DataError
from megalite.data.packing import SampleOrder
from megalite.parallel.context import ParallelContext
from megalite.tokenizer.load import load_tokenizer
from megalite.tokenizer.template import open_template
from megalite.training.samples import slices_of
from megalite.training.world import on_rank_0


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
        "pairs" if run.task == "prefer" else "conversations",
        sources,
        tokenizer,
        open_template(tokenizer, run.data.chat_template),
        seq_length=run.data.seq_length,
        cache_dir=run.data.cache_dir,
    )
    on_rank_0(rank, lambda: len(prepare(report=report, progress=progress)))
    return prepare()


def training_samples(chat: ChatData, run: RunConfig, batch_samples: int) -> ChatSamples:
    """Samples for all optimizer steps, each epoch in another order."""
    packing = run.data.packing and run.task != "prefer"
    order = SampleOrder(run.data.seq_length, run.seed, packing=packing, shuffle=True)
    return chat.samples(order, run.schedule.num_steps * batch_samples)


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
    return ChatLoader(samples, references=references, **slices_of(run, deepspeed, context))


def references_file(chat: ChatData, run: RunConfig, start: str) -> Path:
    """Where log-probabilities are kept, beside the data. start: a fingerprint of the weights of the start."""
    made_from = [start, run.data.seq_length, [source.sha256 for source in chat.sources]]
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    folder = run.data.cache_dir or cache_beside_source(chat.sources[0].name)
    return Path(folder) / f"references-{key}.npy"
