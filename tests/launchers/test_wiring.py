"""What a run records is what it did: the optimizer's learning rate, and the loss on the validation split."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megalite.checkpoint.load import TensorReader, read_config
from megalite.checkpoint.model import build_transformers_model
from megalite.checkpoint.weights import Weights
from tests.launchers.conftest import NUM_STEPS, PEAK, VALIDATE_EVERY, WARMUP_STEPS, Finished
from tests.launchers.jobs import read_rows

LOW, BETA1, BETA2, EPSILON, WEIGHT_DECAY = 1e-4, 0.9, 0.95, 1e-8, 0.1  # the run's defaults, written out
BATCH, SEQ_LENGTH, SEED = 16, 128, 1234


def expected_rate(step: int) -> float:
    """A straight line up to the peak at the end of warm-up, then half a cosine down to the last step."""
    if step <= WARMUP_STEPS:
        return PEAK * step / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (NUM_STEPS - WARMUP_STEPS)
    return LOW + (PEAK - LOW) * (1 + math.cos(math.pi * progress)) / 2


def test_each_row_tells_the_learning_rate_of_its_step(uninterrupted: Finished):
    rates = [row["learning_rate"] for row in read_rows(uninterrupted.folder)]
    assert rates == pytest.approx([expected_rate(step) for step in range(1, NUM_STEPS + 1)], rel=1e-12)
    assert rates[0] > 0 and rates[-1] == pytest.approx(LOW)
    assert all(abs(one / other - 1) > 0.01 for one, other in pairwise(rates))  # one step off would be seen


def used_rate(name: str, before: TensorReader, after: TensorReader) -> tuple[float, float]:
    """The learning rate of the last step, from one tensor, and the largest part of the step that it leaves.

    AdamW (arXiv 1711.05101): weight -= rate * (decay * weight + mean / (sqrt(square) + epsilon)), where mean
    and square are the moments after the step without their bias. So two checkpoints tell the rate.
    """
    mean = after.read("exp_avg", name).double() / (1 - BETA1**NUM_STEPS)
    square = after.read("exp_avg_sq", name).double() / (1 - BETA2**NUM_STEPS)
    weight = before.read("weight", name).double()
    decay = WEIGHT_DECAY if weight.dim() > 1 else 0.0
    direction = decay * weight + mean / (square.sqrt() + EPSILON)
    moved = weight - after.read("weight", name).double()
    rate = (moved * direction).sum() / direction.square().sum()
    return rate.item(), (moved - rate * direction).abs().max().item()


def test_the_optimizer_uses_the_learning_rate_that_is_recorded(uninterrupted: Finished):
    """Read off the weights and moments of the last two checkpoints, for every tensor."""
    checkpoints = uninterrupted.folder / "checkpoints"
    before, after = (TensorReader(checkpoints / f"step-{step:08}") for step in (NUM_STEPS - 1, NUM_STEPS))
    rate_before, recorded = [row["learning_rate"] for row in read_rows(uninterrupted.folder)][-2:]
    names = after.manifest.shapes("weight")
    assert len(names) > 30
    for name in names:
        rate, error = used_rate(name, before, after)
        assert rate == pytest.approx(recorded, rel=1e-3), name
        assert rate != pytest.approx(rate_before, rel=1e-1), name
        assert error < 1e-2 * recorded, name


def first_samples(prefix: str, cache: Path) -> list[torch.Tensor]:
    """The first global batch of the training and of the validation split, [16, 129] ids, by megatron-core."""
    builder = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_builder")
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Vocabulary:
        vocab_size, eod, pad = 257, 256, -1
        unique_identifiers = {"class": "bytes"}  # noqa: RUF012

    flags = dict.fromkeys(("reset_position_ids", "reset_attention_mask", "eod_mask_loss"), False)
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LENGTH,
        tokenizer=Vocabulary(),
        create_attention_mask=False,
        blend=([prefix], None),
        split="969,30,1",
        path_to_cache=str(cache),
        **flags,
    )
    sizes = [NUM_STEPS * BATCH, (NUM_STEPS // VALIDATE_EVERY + 1) * BATCH, None]  # Megatron's counts
    training, validation, _ = builder.BlendedMegatronDatasetBuilder(
        GPTDataset, sizes, lambda: True, config
    ).build()
    return [torch.stack([whole(part[i]) for i in range(BATCH)]) for part in (training, validation)]


def whole(sample: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([sample["tokens"], sample["labels"][-1:]])


@torch.no_grad()
def mean_loss(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Mean over all tokens, in nats."""
    logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), tokens[:, 1:].flatten()).item()


@pytest.mark.filterwarnings("ignore")
def test_validation_is_the_loss_of_the_saved_model_on_the_validation_split(
    uninterrupted: Finished, prefix: str, tmp_path: Path
):
    """The same checkpoint in transformers, the same samples by megatron-core."""
    checkpoint = uninterrupted.folder / f"checkpoints/step-{NUM_STEPS:08}"
    model = build_transformers_model(Weights(checkpoint, read_config(checkpoint).model, "float32"))
    on_training, on_validation = (mean_loss(model, tokens) for tokens in first_samples(prefix, tmp_path))
    recorded = read_rows(uninterrupted.folder)[-1]["validation_loss"]
    assert recorded == pytest.approx(on_validation, rel=1e-5)
    assert abs(recorded - on_training) > 1e-2  # the other split would be seen
