"""One pipeline stage of a Llama decoder: [embedding] blocks [norm, head, loss].

With one stage it is the whole model. Shapes: s sequence, b micro batch, h hidden, V vocabulary,
t tensor-parallel ranks; under sequence parallelism activations between blocks are [s/t, b, h].
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megalite.config.model import ModelConfig
from megalite.model.block import DecoderBlock
from megalite.model.documents import Documents
from megalite.model.init import llama_initializer
from megalite.model.layout import StageLayout
from megalite.model.rope import RotaryEmbedding
from megalite.parallel.cross_entropy import vocab_parallel_cross_entropy
from megalite.parallel.embedding import VocabParallelEmbedding, vocabulary_spec
from megalite.parallel.linear import ColumnParallelLinear
from megalite.parallel.norm import ParallelRMSNorm
from megalite.parallel.shard import Initializer, sharded_parameter

EMBEDDING_NAME = "model.embed_tokens"


class LlamaStage(nn.Module):
    """The layers of one stage, with Hugging Face's parameter names in their specs.

    Args:
        config: the model.
        layout: process groups, sequence parallelism and recomputation; by default one process.
        layers: which decoder layers this stage holds; by default all.
        seed: of the initial weights, which do not depend on the layout.
        dtype: of the parameters; by default torch's.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: StageLayout | None = None,
        *,
        layers: range | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.layout = layout = layout or StageLayout()
        context = layout.context
        init, rotary = llama_initializer(config, seed), RotaryEmbedding(config)
        cut: dict[str, Any] = {"group": context.tp_group, "sequence_parallel": layout.sequence_parallel}
        sizes = (config.vocab_size, config.hidden_size)
        self.embed_tokens, self.norm, self.lm_head = None, None, None
        if context.is_first_stage:
            tied = config.tie_word_embeddings
            self.embed_tokens = VocabParallelEmbedding(
                *sizes, **cut, name=EMBEDDING_NAME, init=init, dtype=dtype, tied=tied
            )
        held = range(config.num_hidden_layers) if layers is None else layers
        blocks = {
            str(i): DecoderBlock(config, rotary, layout, name=f"model.layers.{i}", init=init, dtype=dtype)
            for i in held
        }
        self.layers = nn.ModuleDict(blocks)
        if context.is_last_stage:
            eps = config.rms_norm_eps
            self.norm = ParallelRMSNorm(config.hidden_size, eps=eps, **cut, name="model.norm", dtype=dtype)
            weight = self._head_weight(init, dtype)
            self.lm_head = ColumnParallelLinear(*reversed(sizes), **cut, weight=weight)

    def _head_weight(self, init: Initializer, dtype: torch.dtype | None) -> nn.Parameter:
        """The head's table: the embedding itself, a copy of it if that is on another stage, or its own."""
        config, group = self.config, self.layout.context.tp_group
        shape = (config.vocab_size, config.hidden_size)
        if not config.tie_word_embeddings:
            return sharded_parameter(vocabulary_spec(group, "lm_head.weight", shape), init, dtype)
        if self.embed_tokens is not None:
            return self.embed_tokens.weight
        copy = vocabulary_spec(group, f"{EMBEDDING_NAME}.weight", shape, tied=True, is_owner=False)
        return sharded_parameter(copy, init, dtype)

    def forward(
        self,
        x: torch.Tensor,
        labels: torch.Tensor | None = None,
        document_starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One micro batch through this stage.

        Args:
            x: token ids [b, s] on the first stage, else the previous stage's output.
            labels: next tokens [b, s]; the last stage needs them for the loss.
            document_starts: [b, s], where each token's document starts; attention then stays within it.

        Returns:
            Activations [s, b, h] (or [s/t, b, h]); on the last stage the mean loss, a scalar, or without
            labels this rank's slice of the logits [s, b, padded V/t].
        """
        if self.embed_tokens is not None:
            x = self.embed_tokens(x.T)
        documents = None if document_starts is None else Documents(document_starts)
        for block in self.layers.values():
            if self.layout.recompute == "full" and torch.is_grad_enabled():
                x = checkpoint(block, x, documents, use_reentrant=False)
            else:
                x = block(x, documents)
        if self.lm_head is None or self.norm is None:
            return x
        logits = self.lm_head(self.norm(x))
        if labels is None:
            return logits
        return vocab_parallel_cross_entropy(
            logits, labels.T, vocab_size=self.config.vocab_size, group=self.layout.context.tp_group
        ).mean()
