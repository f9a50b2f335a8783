"""Conversations and pairs as a run reads them: opened, put in order, and cut into batches."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.run import RunConfig
from megalite.data.chat import ChatData, open_conversations, open_pairs
from megalite.data.chat_loader import ChatLoader
from megalite.data.chat_samples import ChatSamples
from megalite.data.error import DataError
from megalite.data.packing import SampleOrder
from megalite.parallel.context import ParallelContext
from megalite.tokenizer.load import load_tokenizer
from megalite.tokenizer.template import open_template


def open_chat(run: RunConfig, sources: list[str], report: Callable[[str], None], progress: bool) -> ChatData:
    """The sources of a run's task, prepared once and then found in the cache.

    Raises DataError or TokenizerError for sources, a template or a tokenizer that cannot serve.
    """
    if run.data.tokenizer is None:
        raise DataError(
            "data.tokenizer is null and the model that the run starts from has none: name its tokenizer"
        )
    tokenizer = load_tokenizer(run.data.tokenizer)
    open_sources = open_pairs if run.task == "prefer" else open_conversations
    return open_sources(
        sources,
        tokenizer,
        open_template(tokenizer, run.data.chat_template),
        seq_length=run.data.seq_length,
        cache_dir=cache_folder(run),
        report=report,
        progress=progress,
    )


def cache_folder(run: RunConfig) -> Path:
    """Where prepared sources lie: the run's cache, or one in its folder."""
    return Path(run.data.cache_dir or Path(run.output_dir) / "cache")


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
    stages, data = context["pp"], context["dp"]
    return ChatLoader(
        samples,
        references=references,
        global_batch_samples=deepspeed.train_batch_size,
        num_micro_batches=deepspeed.num_micro_batches(data.size),
        dp_rank=data.rank,
        dp_size=data.size,
        vocab_size=run.model.vocab_size,
        reads_tokens=stages.rank in (0, stages.size - 1),
    )


def references_file(chat: ChatData, run: RunConfig, start: str) -> Path:
    """Where log-probabilities are kept, beside the data. start: a fingerprint of the weights of the start."""
    made_from = [start, run.data.seq_length, [source.sha256 for source in chat.sources]]
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    return cache_folder(run) / f"references-{key}.npy"
