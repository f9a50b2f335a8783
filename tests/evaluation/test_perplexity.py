"""Perplexity against transformers' own loss and megalite's own model, on windows that are cut by hand."""

import math

import numpy as np
import pytest
import torch

from megalite.checkpoint.model import build_megalite_model, build_transformers_model, megalite_logits
from megalite.checkpoint.weights import Weights
from megalite.data.error import DataError
from megalite.data.indexed_dataset import IndexedDataset
from megalite.data.indexed_writer import UINT16, IndexedDatasetWriter
from megalite.evaluation.perplexity import measure_perplexity
from megalite.evaluation.record import EvaluationError
from megalite.tokenizer.load import build_byte_tokenizer
from megalite.tokenizer.text_bytes import count_text_bytes
from tests.checkpoint.llamas import random_llama, save_llama, tiny_run

CONTEXT = 10
LENGTHS = [1, 25, 0, 10, 11, 2, 40]  # no pair, a rest, empty, exact, a rest of one, a pair, exact
END = 256


def write(tmp_path, documents) -> IndexedDataset:
    with IndexedDatasetWriter(tmp_path / "data", UINT16) as writer:
        for document in documents:
            writer.add_document([np.array(document, np.int64)])
    return IndexedDataset(tmp_path / "data")


@pytest.fixture
def documents() -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(257, size=length).tolist() for length in LENGTHS]


def windows_of(documents) -> list[torch.Tensor]:
    found = []
    for document in documents:
        rest = document
        while len(rest) > 1:
            found.append(torch.tensor([rest[:CONTEXT]]))
            rest = rest[CONTEXT:]
    return found


def weights_of(tmp_path, variant) -> Weights:
    run = tiny_run(variant)
    return Weights(save_llama(tmp_path / "checkpoints", random_llama(run.model), run), run.model)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "experts"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_loss_is_that_of_transformers_and_of_megalite_on_the_same_windows(
    tmp_path, documents, variant, batch_size
):
    weights = weights_of(tmp_path, variant)
    model = build_transformers_model(weights).eval()
    found = measure_perplexity(model, write(tmp_path, documents), context=CONTEXT, batch_size=batch_size)
    windows = windows_of(documents)
    counts = [window.shape[1] - 1 for window in windows]
    theirs = [model(window, labels=window).loss.item() * n for window, n in zip(windows, counts, strict=True)]
    own = build_megalite_model(weights)
    ours = [
        torch.nn.functional.cross_entropy(
            megalite_logits(own, window)[0, :-1], window[0, 1:], reduction="sum"
        ).item()
        for window in windows
    ]
    assert found.num_predicted == sum(counts)
    assert (found.num_tokens, found.num_documents) == (sum(LENGTHS), len(LENGTHS))
    assert found.loss == pytest.approx(sum(theirs) / sum(counts), rel=1e-6)
    assert found.loss == pytest.approx(sum(ours) / sum(counts), rel=1e-5)
    values = {row.metric: row.value for row in found.measurements("data")}
    assert values == {"loss": found.loss, "perplexity": pytest.approx(math.exp(found.loss))}


def test_bytes_are_those_of_the_predicted_text_without_the_end_of_text(tmp_path):
    text = "né ∞ x"
    document = [*text.encode(), END]
    found = measure_perplexity(
        build_transformers_model(weights_of(tmp_path, "plain")).eval(),
        write(tmp_path, [document, document]),
        context=64,
        bytes_of_ids=count_text_bytes(build_byte_tokenizer(), 300),
    )
    assert found.num_bytes == 2 * (len(text.encode()) - 1)
    values = {row.metric: row.value for row in found.measurements("data")}
    assert values["byte_perplexity"] == pytest.approx(math.exp(found.nats / found.num_bytes))
    assert values["bits_per_byte"] == pytest.approx(found.nats / found.num_bytes / math.log(2))


def test_a_limit_takes_the_first_documents(tmp_path, documents):
    model = build_transformers_model(weights_of(tmp_path, "plain")).eval()
    found = measure_perplexity(model, write(tmp_path, documents), context=CONTEXT, limit=2)
    first = measure_perplexity(model, write(tmp_path, documents[:2]), context=CONTEXT)
    assert found == first


@pytest.mark.parametrize(
    ("documents", "context", "error", "message"),
    [
        ([[1, 2]], 1, EvaluationError, "--context: expected 2 to the model's 64 tokens, found 1"),
        ([[1, 2]], 65, EvaluationError, "--context: expected 2 to the model's 64 tokens, found 65"),
        (
            [[1], []],
            10,
            EvaluationError,
            "expected a document of at least 2 tokens, found 2 documents",
        ),
        ([[1, 257]], 10, DataError, "token 1: token id: expected 0 to 256, found 257"),
    ],
)
def test_what_cannot_be_measured_is_one_line(tmp_path, documents, context, error, message):
    model = build_transformers_model(weights_of(tmp_path, "plain"))
    with pytest.raises(error, match=message):
        measure_perplexity(model, write(tmp_path, documents), context=context)
