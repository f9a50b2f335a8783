"""Tokens one after another, from a model whose layers may lie on many tensor-parallel ranks.

Shapes: b prompts, s new tokens, V vocabulary, t tensor-parallel ranks.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megalite.config.model import ModelConfig
from megalite.model.attention import kv_copies
from megalite.model.cache import KeyValueCache
from megalite.model.llama import LlamaStage
from megalite.model.sampling import Sampling
from megalite.parallel.context import Group, ParallelContext, group_size
from megalite.parallel.mappings import start_all_gather, wait_for
from megalite.parallel.topology import Topology


def decoding_context(
    model: ModelConfig, device: torch.device, rank: int = 0, world_size: int = 1
) -> ParallelContext:
    """All ranks of the world as one tensor-parallel group; collective."""
    if world_size == 1:
        return ParallelContext(device=device)
    copies = kv_copies(model.num_key_value_heads, world_size)
    topology = Topology(world_size, tp_size=world_size, kv_copy_size=copies)
    return ParallelContext.build(topology, rank, device).share_memory()


def decode(
    stage: LlamaStage,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator | None = None,
) -> Iterator[list[int]]:
    """The next token of every prompt, up to `max_new_tokens` times: ask no more when there is enough.

    stage: a whole model in evaluation, its layers over tp alone and no activations cut along the sequence.
    prompts: token ids, at least one each; they need not be equally long.
    generator: of the draws, on the model's device; by default torch's own.

    The ranks of tp all ask, and all get what the first of them drew. Nothing stops a prompt by itself.
    """
    assert stage.embed_tokens is not None
    group, device = stage.embed_tokens.plan.tp_group, stage.embed_tokens.weight.device
    length = max(map(len, prompts))
    padding = [length - len(prompt) for prompt in prompts]
    filled = [[0] * count + list(prompt) for count, prompt in zip(padding, prompts, strict=True)]
    room = length + max_new_tokens
    cache = KeyValueCache(stage.config.num_hidden_layers, torch.tensor(padding, device=device), room)
    new = torch.tensor(filled, device=device)
    for _ in range(max_new_tokens):
        tokens = sampling.draw(next_logits(stage, new, cache), generator)
        _as_on_first(tokens, group)
        yield tokens.tolist()
        new = tokens.unsqueeze(1)


@torch.no_grad()
def next_logits(stage: LlamaStage, tokens: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
    """New tokens [b, s], which the cache keeps -> logits of the token after them [b, V], on all ranks."""
    assert stage.embed_tokens is not None and stage.norm is not None and stage.lm_head is not None
    x = stage.embed_tokens(tokens.T)
    for block, spans in zip(stage.layers.values(), cache.extend(tokens.size(1)), strict=True):
        x = block(x, spans=spans)
    part = stage.lm_head(stage.norm(x[-1:])).squeeze(0)  # [b, padded V/t]
    whole, work = start_all_gather(part.T, stage.embed_tokens.plan.tp_group)
    wait_for(work)
    return whole[: stage.config.vocab_size].T


def _as_on_first(tokens: torch.Tensor, group: Group) -> None:
    """Overwrite tokens by those of the group's first rank: equal seeds do not prove equal draws."""
    if group_size(group) > 1:
        dist.broadcast(tokens, group=group, group_src=0)
