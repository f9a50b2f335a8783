"""Decoding with a cache against transformers' `generate`, on one rank and on many."""

from functools import cache

import pytest
import torch
import torch.distributed as dist

from megalite.batch import Batch
from megalite.checkpoint.agreement import alone
from megalite.checkpoint.model import load_stage
from megalite.model.cache import KeyValueCache
from megalite.model.decoding import decode, decoding_context, next_logits
from megalite.model.sampling import Sampling
from megalite.parallel.plan import LayerPlan
from megalite.training.world import gather
from tests.checkpoint.llamas import random_llama, save_llama, tiny_run
from tests.harness import run_distributed

NUM_NEW = 12
PROMPTS = [[7, 250, 3, 3, 91, 18, 40], [5], [200, 100, 50], [1, 2, 3, 4, 5, 6, 7]]
GREEDY = Sampling(temperature=0)
CPU = torch.device("cpu")


@cache
def llama_of(variant):
    return random_llama(tiny_run(variant).model)


def saved(folder, variant):
    return save_llama(folder, llama_of(variant), tiny_run(variant))


def theirs(variant, prompts):
    """transformers' greedy tokens for each prompt on its own, where nothing can go wrong with padding."""
    tokens = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = llama_of(variant).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False
        )
        tokens.append(made[0, len(prompt) :].tolist())
    return tokens


def stage_of(rank, checkpoint, variant, dtype=torch.float32):
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    context = decoding_context(tiny_run(variant).model, CPU, rank, world_size)
    plan = LayerPlan(context, dtype=dtype)
    return load_stage(checkpoint, tiny_run(variant).model, plan, gather if world_size > 1 else alone)


def tokens_of(rank, checkpoint, variant, prompts, sampling=GREEDY, seed=None):
    """The new tokens of each prompt. seed: of rank 0's draws; each rank has another."""
    generator = None if seed is None else torch.Generator().manual_seed(seed + rank)
    stage = stage_of(rank, checkpoint, variant)
    return list(map(list, zip(*decode(stage, prompts, NUM_NEW, sampling, generator), strict=True)))


@pytest.mark.parametrize("variant", ["plain", "tied", "biases", "llama3", "experts", "tied experts"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one prompt", "unequal prompts"])
def test_greedy_tokens_are_those_of_transformers(tmp_path, variant, prompts):
    checkpoint = saved(tmp_path, variant)
    assert tokens_of(0, checkpoint, variant, prompts) == theirs(variant, prompts)


@pytest.mark.parametrize(
    ("variant", "tp_size"), [("plain", 2), ("biases", 2), ("experts", 2), ("plain", 4), ("tied experts", 4)]
)
def test_they_are_the_same_over_tensor_parallel_ranks(tmp_path, variant, tp_size):
    """With 4 ranks and 2 key/value heads each head has a copy."""
    checkpoint, expected = saved(tmp_path, variant), theirs(variant, PROMPTS)
    on_ranks = run_distributed(tokens_of, tp_size, checkpoint, variant, PROMPTS)
    assert on_ranks == [expected] * tp_size


def test_padded_prompts_are_those_of_transformers_with_an_attention_mask(tmp_path):
    """The same batch, filled up in front in the same way."""
    length = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    made = llama_of("plain").generate(ids, attention_mask=mask, max_new_tokens=NUM_NEW, do_sample=False)
    expected = made[:, length:].tolist()
    assert tokens_of(0, saved(tmp_path, "plain"), "plain", PROMPTS) == expected


def logits_in_passes(rank, checkpoint, tokens, cuts, num_padding):
    """Logits after each pass, of a cache that gets the tokens in several."""
    stage = stage_of(rank, checkpoint, "plain")
    memory = KeyValueCache(len(stage.layers), num_padding, tokens.size(1))
    return [next_logits(stage, part, memory) for part in tokens.split(cuts, dim=1)]


@pytest.mark.parametrize("cuts", [[9], [4, 5], [1] * 9])
def test_logits_are_those_of_the_whole_sequence_however_it_comes(tmp_path, cuts):
    tokens = torch.randint(257, (3, 9), generator=torch.Generator().manual_seed(0))
    checkpoint, none = saved(tmp_path, "plain"), torch.zeros(3, dtype=torch.int64)
    stage = stage_of(0, checkpoint, "plain")
    with torch.no_grad():
        whole = stage(None, Batch(tokens))[..., :257]
    ends = torch.tensor(cuts).cumsum(0) - 1
    found = torch.stack(logits_in_passes(0, checkpoint, tokens, cuts, none))
    torch.testing.assert_close(found, whole[ends], rtol=1e-4, atol=1e-4)
    for on_rank in run_distributed(logits_in_passes, 2, checkpoint, tokens, cuts, none):
        torch.testing.assert_close(torch.stack(on_rank), whole[ends], rtol=1e-4, atol=1e-4)


def test_what_stands_in_the_padding_changes_nothing(tmp_path):
    checkpoint, num_padding = saved(tmp_path, "plain"), torch.tensor([3, 0])
    tokens = torch.randint(257, (2, 9), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, :3] = 99
    before, after = (logits_in_passes(0, checkpoint, x, [5, 4], num_padding) for x in (tokens, other))
    assert all(map(torch.equal, before, after))
    other[0, 3] = 99  # the control: a token that is none
    assert not torch.equal(logits_in_passes(0, checkpoint, other, [5, 4], num_padding)[-1], after[-1])


def test_all_ranks_take_what_the_first_one_draws(tmp_path):
    """Each rank draws with a seed of its own."""
    checkpoint, sampling = saved(tmp_path, "plain"), Sampling(temperature=1.5)
    alone_drawn = tokens_of(0, checkpoint, "plain", PROMPTS, sampling, 5)
    assert alone_drawn != tokens_of(1, checkpoint, "plain", PROMPTS, sampling, 5)
    assert run_distributed(tokens_of, 2, checkpoint, "plain", PROMPTS, sampling, 5) == [alone_drawn] * 2


def held_by(rank, checkpoint, variant):
    stage = stage_of(rank, checkpoint, variant, torch.bfloat16)
    dtypes = {tensor.dtype for tensor in stage.parameters()}
    return sum(tensor.numel() for tensor in stage.parameters()), dtypes, stage.training


def test_a_rank_holds_its_part_alone_in_the_dtype_that_is_asked_for(tmp_path):
    checkpoint = saved(tmp_path, "plain")
    [(whole, _, _)] = run_distributed(held_by, 1, checkpoint, "plain")
    for size, dtypes, is_training in run_distributed(held_by, 2, checkpoint, "plain"):
        assert size < 0.7 * whole  # norms and the vocabulary's padding lie on both
        assert dtypes == {torch.bfloat16} and not is_training
