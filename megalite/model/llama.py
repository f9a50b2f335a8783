"""A share of a Llama decoder: [embedding] blocks [norm, head, loss]; by default all of it.

Shapes: s sequence, b micro batch, h hidden, V vocabulary, t tensor-parallel ranks; under sequence
parallelism activations between blocks are [s/t, b, h]. Under context parallelism all that a rank is given is
its part of the sequence (parallel/sequence.py), and s is that part.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from megalite.batch import Batch
from megalite.config.model import ModelConfig
from megalite.model.block import DecoderBlock
from megalite.model.init import llama_initializer
from megalite.model.loss import Head, next_token_loss
from megalite.model.moe import MixtureOfExperts, TopKRouter, unobserved
from megalite.model.rope import RotaryEmbedding
from megalite.model.share import StageShare
from megalite.model.spans import AttentionSpans
from megalite.model.spread_attention import SpreadSpans
from megalite.model.table import adapter_table, buffer_table, model_table
from megalite.parallel.embedding import VocabParallelEmbedding, vocabulary_spec
from megalite.parallel.head import VocabParallelHead
from megalite.parallel.norm import ParallelRMSNorm
from megalite.parallel.plan import LayerPlan, Lora
from megalite.parallel.sequence import SequenceCut
from megalite.parallel.shard import sharded_parameter, spec_of, state_buffers

EMBEDDING_NAME = "model.embed_tokens"
Loss = Callable[[Head, Batch], torch.Tensor]


class LlamaStage(nn.Module):
    """The layers of one share, with Hugging Face's parameter names in their specs.

    Args:
        config: the model.
        plan: process groups, sequence parallelism, number formats; by default one process. Without `init` of
            its own the initial weights depend on `seed` and names alone, not on the layout.
        share: which layers and ends are held; by default the whole model.
        seed: of the initial weights.
        recompute: what backward computes again: "none", "selective" (attention) or "full" (blocks).
        offload: whether the inputs of blocks that are computed again wait for it in host memory.
        context_attention: how the ranks of cp attend to each other's keys, see model/spread_attention.py.
        loss: (the head behind the last hidden states, batch) to a sum; by default that of the next tokens.
        table: of a share with the head and no embedding: the embedding of the same rank's other share, whose
            weight is the head's where they are tied.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: LayerPlan | None = None,
        share: StageShare | None = None,
        *,
        seed: int = 0,
        recompute: str = "none",
        offload: bool = False,
        context_attention: str = "gather",
        loss: Loss | None = None,
        table: VocabParallelEmbedding | None = None,
    ) -> None:
        super().__init__()
        plan = plan or LayerPlan()
        plan = plan if plan.init else replace(plan, init=llama_initializer(config, seed))
        self.config, self.plan, self.recompute = config, plan, recompute
        self.offload = offload
        self._cut = lru_cache(maxsize=8)(SequenceCut)  # tables that go to a device make the host wait
        self.context_attention = context_attention
        self.share = share = share or StageShare.whole(config)
        self.embed_tokens = self._embedding(plan) if share.has_embedding else None
        rotary, attention_too = RotaryEmbedding(config), recompute == "selective"
        blocks = {
            str(i): DecoderBlock(
                config,
                rotary,
                plan,
                name=f"model.layers.{i}",
                has_experts=config.has_experts(i),
                recompute_attention=attention_too,
            )
            for i in share.layers
        }
        self.layers = nn.ModuleDict(blocks)
        self.norm: ParallelRMSNorm | None = None
        self.lm_head: VocabParallelHead | None = None
        if share.has_head:
            self.norm, self.lm_head = self._head(plan, self.embed_tokens or table)
        self.loss = loss or next_token_loss
        check_against_table(self, config, plan.lora)
        if plan.lora:
            self._freeze()

    def _embedding(self, plan: LayerPlan) -> VocabParallelEmbedding:
        config = self.config
        tied = config.tie_word_embeddings and not (self.share.has_head or self.share.has_other_end)
        sizes = (config.vocab_size, config.hidden_size)
        return VocabParallelEmbedding(*sizes, plan, name=EMBEDDING_NAME, tied=tied)

    def _head(
        self, plan: LayerPlan, table: VocabParallelEmbedding | None
    ) -> tuple[ParallelRMSNorm, VocabParallelHead]:
        config = self.config
        norm = ParallelRMSNorm(config.hidden_size, plan, eps=config.rms_norm_eps, name="model.norm")
        weight = self._head_weight(plan, table)
        return norm, VocabParallelHead(config.hidden_size, config.vocab_size, plan, weight)

    def _head_weight(self, plan: LayerPlan, table: VocabParallelEmbedding | None) -> nn.Parameter:
        """The head's table: the embedding itself, a copy of it if that is on another rank, or its own."""
        tied = self.config.tie_word_embeddings
        if tied and table is not None:
            return table.weight
        shape = (self.config.vocab_size, self.config.hidden_size)
        name = EMBEDDING_NAME if tied else "lm_head"
        spec = vocabulary_spec(plan.context, f"{name}.weight", shape)
        assert plan.init is not None
        return sharded_parameter(spec.tied_over_stages(copy=1) if tied else spec, plan.init, plan.dtype)

    def _freeze(self) -> None:
        """Let adapters alone learn."""
        for parameter in self.parameters():
            parameter.requires_grad_("lora_" in spec_of(parameter).name)

    def _spans(self, x: torch.Tensor, batch: Batch) -> AttentionSpans | None:
        """What each token of this rank may see, the first activations being x."""
        ranks = self.plan.context["cp"]
        if ranks.size == 1:
            return AttentionSpans.of(batch)
        parts = ranks.size * (self.plan.context["tp"].size if self.plan.sequence_parallel else 1)
        cut = self._cut(x.size(0) * parts, ranks, x.device)
        return SpreadSpans.of_part(batch, cut, self.context_attention, x.device)

    def _kept(self, device: torch.device) -> AbstractContextManager:
        """Where the inputs of checkpointed blocks wait: what blocks save themselves is computed again."""
        return save_on_cpu(pin_memory=device.type == "cuda") if self.offload else nullcontext()

    def routers(self) -> dict[int, TopKRouter]:
        """The routers of the layers with experts, by layer."""
        mlps = {int(i): block.mlp for i, block in self.layers.items()}
        return {i: mlp.gate for i, mlp in mlps.items() if isinstance(mlp, MixtureOfExperts)}

    def forward(self, x: torch.Tensor | None, batch: Batch) -> torch.Tensor:
        """One micro batch through this share.

        x: the activations of the share before; None where the embedding is, which takes batch.input_ids.

        Returns activations [s, b, h] (or [s/t, b, h]); where the head is, the loss sum, a scalar, or without
        labels this rank's slice of the logits [s, b, padded V/t].
        """
        if self.embed_tokens is not None:
            assert batch.input_ids is not None
            x = self.embed_tokens(batch.input_ids.T)
        assert x is not None
        spans = self._spans(x, batch)
        padding = None if batch.padding is None else batch.padding.T
        for block in self.layers.values():
            # By keyword: ZeRO-3's hooks look into positional arguments for tensors to watch.
            if self.recompute == "full" and torch.is_grad_enabled():
                again: dict[str, Any] = {"use_reentrant": False, "context_fn": partial(_observed_once, block)}
                with self._kept(x.device):
                    x = checkpoint(block, x, spans=spans, padding=padding, **again)
            else:
                x = block(x, spans=spans, padding=padding)
        if self.lm_head is None or self.norm is None:
            return x
        x = self.norm(x)
        return self.lm_head(x) if batch.labels is None else self.loss(partial(self.lm_head, x), batch)


def _observed_once(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of a block's forward and of its repetition in backward."""
    return nullcontext(), unobserved(block)


def check_against_table(stage: LlamaStage, config: ModelConfig, lora: Lora | None = None) -> None:
    """Raise AssertionError unless the stage holds the table's tensors of its share, cut as the rows say."""
    share = stage.share
    ends = {"model.embed_tokens.weight": share.has_embedding, "model.norm.weight": share.has_head}
    ends |= {"lm_head.weight": share.has_head}
    if config.tie_word_embeddings:
        ends["model.embed_tokens.weight"] |= share.has_head
    rows = model_table(config) + buffer_table(config)
    rows += adapter_table(config, lora.rank, lora.targets) if lora else []
    expected = {
        (row.name, row.shape, row.cut_dims)
        for row in rows
        if (row.layer in share.layers if row.layer is not None else ends[row.name])
    }
    specs = map(spec_of, [*stage.parameters(), *state_buffers(stage)])
    held = {(spec.name, spec.full_shape, tuple(cut.dim for cut in spec.cuts)) for spec in specs}
    assert held == expected, f"not as in the model's table: {sorted(map(str, held ^ expected))[0]}"
