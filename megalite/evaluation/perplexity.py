"""Loss and perplexity of a model on a token file.

Each document is cut into windows of `context` tokens that do not overlap; each window predicts all its tokens
but the first, from those before it in the window. So the first token of a window is never predicted, and
documents see nothing of each other.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from megalite.batch import IGNORED
from megalite.data.indexed_dataset import IndexedDataset
from megalite.data.loader import check_vocabulary
from megalite.evaluation.record import EvaluationError, Measurement


@dataclass(frozen=True)
class Perplexity:
    """The sum of losses over a token file, and what it is divided by.

    Attributes:
        nats: the sum, over the tokens that were predicted.
        num_predicted, num_tokens: tokens that were predicted, and all tokens of the documents.
        num_documents: of the file, or as many as were looked at.
        num_bytes: of text that the predicted tokens stand for; None where the tokenizer does not tell.
    """

    nats: float
    num_predicted: int
    num_tokens: int
    num_documents: int
    num_bytes: int | None = None

    @property
    def loss(self) -> float:
        """Nats per predicted token."""
        return self.nats / self.num_predicted

    def measurements(self, name: str) -> list[Measurement]:
        """loss; perplexity; byte_perplexity and bits_per_byte as lm-evaluation-harness defines them."""
        numbers = {"loss": self.loss, "perplexity": _exp(self.loss)}
        if self.num_bytes:
            per_byte = self.nats / self.num_bytes
            numbers |= {"byte_perplexity": _exp(per_byte), "bits_per_byte": per_byte / math.log(2)}
        return [
            Measurement(name, metric, number, num_samples=self.num_documents)
            for metric, number in numbers.items()
        ]


def measure_perplexity(
    model: Any,
    dataset: IndexedDataset,
    *,
    context: int,
    batch_size: int = 8,
    limit: int | None = None,
    bytes_of_ids: np.ndarray | None = None,
    progress: bool = False,
) -> Perplexity:
    """The perplexity of a model of transformers on a token file, over its first `limit` documents or all.

    context: tokens of a window. batch_size: windows that are computed at once.
    bytes_of_ids: bytes of text that each id stands for.

    Raises EvaluationError when the model has no such context or there is nothing to predict, DataError at an
    id that the model has not.
    """
    most = model.config.max_position_embeddings
    if not 2 <= context <= most:
        raise EvaluationError(f"--context: expected 2 to the model's {most} tokens, found {context}")
    check_vocabulary(dataset, model.config.vocab_size, dataset.num_tokens)
    num_documents = min(dataset.num_documents, limit or dataset.num_documents)
    lengths = [len(dataset.document(index)) for index in range(num_documents)]
    num_predicted = sum(lengths) - sum(-(-length // context) for length in lengths)
    if not num_predicted:
        found = f"{num_documents} documents with {sum(lengths)} tokens"
        raise EvaluationError(f"{dataset.prefix}: expected a document of at least 2 tokens, found {found}")
    windows = cut_windows(dataset, num_documents, context)
    nats, num_bytes = 0.0, 0
    with tqdm(total=num_predicted, desc=dataset.prefix, unit="token", disable=not progress) as bar:
        while batch := list(islice(windows, batch_size)):
            nats += sum_losses(model, batch)
            bar.update(sum(len(window) - 1 for window in batch))
            if bytes_of_ids is not None:
                num_bytes += sum(int(bytes_of_ids[window[1:]].sum()) for window in batch)
    counts = (num_predicted, sum(lengths), num_documents)
    return Perplexity(nats, *counts, None if bytes_of_ids is None else num_bytes)


def cut_windows(dataset: IndexedDataset, num_documents: int, context: int) -> Iterator[np.ndarray]:
    """The windows of at least 2 tokens of the first documents, i64."""
    for index in range(num_documents):
        document = dataset.document(index)
        for start in range(0, len(document) - 1, context):
            yield document[start : start + context].astype(np.int64)


@torch.no_grad()
def sum_losses(model: Any, windows: Sequence[np.ndarray]) -> float:
    """Nats over all tokens but the first of each window. Shorter windows are filled up at their end.

    No token sees the filling, and it has no part in the sum.
    """
    rows = [torch.from_numpy(window) for window in windows]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED).to(model.device)
    logits = model(tokens, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    losses = F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none")
    return losses.double().sum().item()


def _exp(nats: float) -> float:
    """e to the nats, infinite where that exceeds a float."""
    return torch.tensor(nats, dtype=torch.float64).exp().item()
