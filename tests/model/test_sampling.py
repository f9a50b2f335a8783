"""Which tokens take part in a draw and how often they come, against transformers' own rules."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megalite.model.sampling import Sampling

LOGITS = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3


def theirs(sampling):
    scores = TemperatureLogitsWarper(sampling.temperature)(None, LOGITS)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_k": 100},
        {"top_p": 0.7},
        {"top_p": 1e-6},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.9},
    ],
)
def test_candidates_are_those_of_transformers_with_their_probabilities(options):
    sampling = Sampling(**options)
    probabilities, ids = sampling.candidates(LOGITS)
    by_id = torch.zeros_like(LOGITS).scatter(-1, ids, probabilities)
    torch.testing.assert_close(by_id, theirs(sampling))
    assert (by_id > 0).equal(theirs(sampling) > 0)


def test_draws_come_as_often_as_their_probabilities_say():
    sampling, generator = Sampling(temperature=2.0, top_k=4), torch.Generator().manual_seed(0)
    drawn = sampling.draw(LOGITS[:1].expand(20_000, -1), generator)
    shares = drawn.bincount(minlength=50) / len(drawn)
    torch.testing.assert_close(shares, theirs(sampling)[0], rtol=0, atol=0.02)


def test_no_temperature_is_the_likeliest_and_a_seed_repeats_its_draws():
    assert Sampling(temperature=0).draw(LOGITS).equal(LOGITS.argmax(-1))
    first, again, other = (
        [Sampling().draw(LOGITS, g).tolist() for _ in range(5)]
        for g in (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    )
    assert first == again != other
