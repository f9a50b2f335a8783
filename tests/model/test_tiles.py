"""A feed-forward layer in tiles and layers' inputs in host memory: the same numbers in less memory.

That every layout gives the same losses and gradients with tiles is in tests/test_equivalence.py.
"""

import ctypes
import multiprocessing
import os
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from megalite.batch import Batch
from megalite.config.model import ModelConfig
from megalite.config.parallel import ParallelConfig
from megalite.kernels.choice import choose_kernels
from megalite.model import llama
from megalite.model.llama import LlamaStage
from megalite.model.mlp import ParallelMLP
from megalite.parallel.plan import LayerPlan

LENGTH, DOCUMENT, TILE = 65536, 64, 2048
M_MMAP_THRESHOLD = -3  # of malloc.h
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=8,
    intermediate_size=512,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    max_position_embeddings=LENGTH,
)
# What a step takes beside its weights. In tiles: of 65,536 tokens some dozen tensors of 8 numbers, 2 MiB
# each, and of a tile some of 512, 4 MiB each. At once: of all tokens at least 3 of 512, 128 MiB each.
BOUND_BYTES = 256 << 20
REFUSED = 3  # the exit status of a process that got no memory


def mlp_of(tile_tokens: int) -> ParallelMLP:
    torch.manual_seed(3)
    layer = ParallelMLP(CONFIG, LayerPlan(dtype=torch.float64, tile_tokens=tile_tokens), name="m")
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return layer


@pytest.mark.parametrize(("tile_tokens", "num_tiles"), [(14, 6), (1, 40), (79, 2), (80, 1)])
def test_tiles_give_the_gradients_of_one(tile_tokens: int, num_tiles: int, monkeypatch) -> None:
    sizes: list[int] = []
    inner = ParallelMLP._tile
    monkeypatch.setattr(ParallelMLP, "_tile", lambda self, x: sizes.append(x.size(0)) or inner(self, x))
    x = torch.randn(40, 2, CONFIG.hidden_size, dtype=torch.float64)
    results = []
    for tokens in (0, tile_tokens):
        layer, own = mlp_of(tokens), x.clone().requires_grad_()
        sizes.clear()
        out = layer(own)
        assert sum(sizes) == 40 and len(sizes) == (num_tiles if tokens else 1)
        out.square().sum().backward()
        results.append([out.detach(), own.grad, *(parameter.grad for parameter in layer.parameters())])
    for got, want in zip(*results[::-1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_without_gradients_tiles_are_not_computed_again() -> None:
    layer, x = mlp_of(6), torch.randn(9, 2, CONFIG.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(layer(x), mlp_of(0)(x)) or torch.allclose(layer(x), mlp_of(0)(x), rtol=1e-12)
        assert not layer(x).requires_grad


def take_step(tile_tokens: int) -> None:
    """A forward and backward pass on one sample of 65,536 tokens in documents of 64, within the bound.

    In a process of its own, which ends with REFUSED where the system gives it no memory.
    """
    torch.set_num_threads(1)
    kernels = choose_kernels("blocks", "rows", device=torch.device("cpu"))  # which sees no whole mask
    stage = LlamaStage(CONFIG, LayerPlan(kernels=kernels, tile_tokens=tile_tokens), recompute="full")
    ids = torch.randint(CONFIG.vocab_size, (1, LENGTH + 1))
    starts = torch.arange(LENGTH)[None] // DOCUMENT * DOCUMENT
    batch = Batch(ids[:, :-1], ids[:, 1:], document_starts=starts)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)  # what is freed goes back to the system
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + BOUND_BYTES,) * 2)
    try:
        stage(None, batch).backward()
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        os._exit(REFUSED)
    assert all(parameter.grad is not None for parameter in stage.parameters())


def within_bound(tile_tokens: int) -> bool:
    """Not a fork, which would have the locks of this process's threads as they were, held ones too."""
    process = multiprocessing.get_context("spawn").Process(target=take_step, args=(tile_tokens,))
    process.start()
    process.join()
    assert process.exitcode in (0, REFUSED)
    return process.exitcode == 0


def test_65536_tokens_fit_in_tiles_and_not_without() -> None:
    assert within_bound(TILE)
    assert not within_bound(0)


def test_inputs_of_layers_go_to_the_host_and_come_back(monkeypatch) -> None:
    """Each layer's input, once each way, and nothing else; the gradients are the same bits."""
    kept: list[torch.Size] = []

    class Host(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            assert not pin_memory  # on a CPU
            super().__init__(
                lambda tensor: kept.append(tensor.shape) or tensor.clone(), lambda tensor: tensor
            )

    monkeypatch.setattr(llama, "save_on_cpu", Host)
    ids = torch.randint(CONFIG.vocab_size, (2, 9))
    gradients = []
    for offload in (False, True):
        stage = LlamaStage(CONFIG, seed=3, recompute="full", offload=offload)
        stage(None, Batch(ids[:, :-1], ids[:, 1:])).backward()
        gradients.append([parameter.grad for parameter in stage.parameters()])
    assert all(map(torch.equal, *gradients))
    assert kept == [(8, 2, CONFIG.hidden_size)] * CONFIG.num_hidden_layers


def test_only_inputs_of_layers_can_wait_in_host_memory() -> None:
    with pytest.raises(ValueError, match=r"recompute 'selective' keeps more: set parallel.recompute=full"):
        ParallelConfig(offload_activations=True, recompute="selective")
