"""What forward keeps for backward, and what a layer takes while it computes; in bytes of one rank.

All is of one micro batch.

Letters: n tokens of a rank in a layer, m of these between layers (n/t under sequence parallelism), h hidden,
q and k features of this rank's queries and keys, i of its MLP, e bytes of a number.
Counted is what our own layers save, see model/block.py; Korthikanti 2022 (arXiv 2205.05198) counts others'.
"""

from dataclasses import dataclass

from megalite.kernels.limits import BLOCK_BYTES, KEPT_TOKENS
from megalite.parallel.vocabulary import CHUNK_LOGITS, padded_vocab_size
from megalite.plan.layout import RankLayout


@dataclass(frozen=True)
class LayerSizes:
    """A decoder layer's, in numbers: n, m, h, q, k, i of this rank; `kept` of attention's probabilities.

    gated: tensors that silu(gate) * up keeps for backward; gated_experts: of routed ones.
    """

    n: int
    m: int
    h: int
    q: int
    k: int
    i: int
    routed: int
    router: int
    kept: int
    gated: int
    gated_experts: int

    @classmethod
    def of(cls, layout: RankLayout, layer: int, device: str) -> "LayerSizes":
        """Of a layer; one with experts has the width of those that a token goes to."""
        model, kernels, tp_size = layout.run.model, layout.run.kernels, layout.tp_size
        has_experts = model.has_experts(layer)
        by_liger = kernels.gating == "liger"
        width = model.shared_intermediate_size if has_experts else model.intermediate_size
        routed = (model.moe_intermediate_size or 0) * model.num_experts_per_tok if has_experts else 0
        return cls(
            n=layout.tokens,
            m=layout.tokens_between,
            h=model.hidden_size,
            q=model.num_attention_heads * model.head_dim // tp_size,
            k=max(1, model.num_key_value_heads // tp_size) * model.head_dim,
            i=width // tp_size,
            routed=routed // tp_size,
            router=model.n_routed_experts if has_experts else 0,
            kept=_probabilities(layout, device),
            gated=2 if by_liger or (kernels.compile_blocks and kernels.gating == "auto") else 3,
            gated_experts=2 if by_liger else 3,
        )

    @property
    def attention(self) -> int:
        """q, k, v and, where they are kept, the probabilities."""
        return self.n * (self.q + 2 * self.k) + self.kept

    @property
    def mlp(self) -> int:
        """gate, silu(gate) where it is not computed again, up and their product."""
        return self.n * ((self.gated + 1) * self.i + (self.gated_experts + 1) * self.routed)

    @property
    def inputs(self) -> int:
        """Of the linear layers: norms' outputs, attention's output."""
        return 2 * self.m * self.h + self.n * self.q


def _probabilities(layout: RankLayout, device: str) -> int:
    """Numbers of attention's probabilities that backward finds: those of short samples, in blocks."""
    kernels, parallel = layout.run.kernels, layout.run.parallel
    in_blocks = kernels.attention == "blocks" or (kernels.attention == "auto" and device == "cpu")
    by_heads = parallel.cp_size > 1 and parallel.context_attention == "heads"
    length = layout.run.data.seq_length
    kept_tokens = KEPT_TOKENS if kernels.attention_kept_tokens is None else kernels.attention_kept_tokens
    if not in_blocks or length > kept_tokens or (parallel.cp_size > 1 and not by_heads):
        return 0
    heads = layout.run.model.num_attention_heads // layout.tp_size // (parallel.cp_size if by_heads else 1)
    block = max(1, BLOCK_BYTES // layout.number_bytes)
    return (
        layout.rows
        * heads
        * sum(min(block, length - first) * min(first + block, length) for first in range(0, length, block))
    )


def layer_bytes(layout: RankLayout, layer: int, device: str) -> int:
    """What a layer keeps between its forward and its backward."""
    if layout.run.parallel.recompute == "full":
        return layout.tokens_between * layout.run.model.hidden_size * layout.number_bytes
    sizes = LayerSizes.of(layout, layer, device)
    return _kept(layout, sizes, attention_again=layout.run.parallel.recompute == "selective")


def recomputed_bytes(layout: RankLayout, layer: int, device: str) -> int:
    """What is made again, of one layer at a time, in its backward."""
    sizes, recompute = LayerSizes.of(layout, layer, device), layout.run.parallel.recompute
    if recompute == "full":
        return _kept(layout, sizes, attention_again=False)
    return sizes.attention * layout.number_bytes if recompute == "selective" else 0


def _kept(layout: RankLayout, sizes: LayerSizes, attention_again: bool) -> int:
    """Input and middle of the residual stream, inputs of linear layers, attention, MLP, experts."""
    model, e = layout.run.model, layout.number_bytes
    stream = 2 * sizes.m * sizes.h
    attention = sizes.attention - (sizes.kept if attention_again else 0)
    if model.use_qk_norm:
        attention += sizes.n * (sizes.q + sizes.k)
    if not attention_again and layout.run.parallel.cp_size > 1:
        attention += sizes.n * sizes.q  # the output, which backward of a cut sequence needs
    kept = stream + sizes.inputs + attention + sizes.mlp
    if layout.run.parallel.weight_gradient_input == "keep" and _splits(layout):
        kept += 2 * (sizes.n - sizes.m) * sizes.h
    scales = 2 * sizes.m * 4
    return kept * e + scales + _experts(layout, sizes) + _adapters(layout, sizes)


def _experts(layout: RankLayout, sizes: LayerSizes) -> int:
    """Rows that go to experts and come back, the router's numbers in fp32, and where each row goes."""
    if not sizes.router:
        return 0
    choices = layout.run.model.num_experts_per_tok
    rows = 2 * sizes.n * choices * sizes.h * layout.number_bytes
    whole = sizes.n * sizes.h * (layout.number_bytes if layout.tp_size > 1 else 0)
    return rows + whole + 4 * 4 * sizes.n * sizes.router + 5 * 8 * sizes.n * choices


def _adapters(layout: RankLayout, sizes: LayerSizes) -> int:
    """The inner products of adapters, and their outputs' sums."""
    lora = layout.run.lora
    return len(lora.targets) * sizes.n * lora.rank * layout.number_bytes if lora.rank else 0


def left_bytes(layout: RankLayout, layer: int, device: str) -> int:
    """What a split backward leaves of a layer: inputs of linear layers, and gradients of their outputs."""
    s = LayerSizes.of(layout, layer, device)
    inputs = s.inputs + s.n * (s.i + s.routed)
    gradients = s.n * (s.q + 2 * s.k + 2 * s.i + 2 * s.routed) + 2 * s.n * s.h
    return (inputs + gradients) * layout.number_bytes


def backward_bytes(layout: RankLayout, layer: int, device: str) -> int:
    """What a layer's backward takes at most beyond what forward kept, which it lets go of as it runs.

    First the gradients of the MLP's two products; later those of their weights, when what it kept is gone.
    """
    model, s = layout.run.model, LayerSizes.of(layout, layer, device)
    products = 2 * s.n * (s.i + s.routed)
    experts = s.router // layout.run.parallel.ep_size * s.routed // model.num_experts_per_tok
    weights = 2 * s.h * max(s.i, experts)
    return (s.m * s.h + max(products, weights - products)) * layout.number_bytes


def head_kept_bytes(layout: RankLayout) -> int:
    """What the head keeps between its forward and backward: gradients of hidden states and weight."""
    h, e = layout.run.model.hidden_size, layout.number_bytes
    last = 2 * layout.tokens_between * h * e  # input and output of the last norm
    weight = 0 if layout.run.lora.rank else _local_vocabulary(layout) * h * e
    return last + layout.tokens_between * h * e + weight


def head_working_bytes(layout: RankLayout) -> int:
    """Logits of a chunk of tokens, and what turns them into losses and gradients."""
    vocabulary, h, e = _local_vocabulary(layout), layout.run.model.hidden_size, layout.number_bytes
    tokens = min(layout.tokens, max(1, CHUNK_LOGITS // vocabulary))
    chunks = -(-layout.tokens // tokens)
    again = (
        0 if chunks == 1 or layout.run.lora.rank else vocabulary * h * 4
    )  # a chunk's gradient, to be added
    wide = vocabulary * tokens * 4 if e < 4 else 0
    return vocabulary * tokens * e + wide + again + layout.tokens * h * e


def _local_vocabulary(layout: RankLayout) -> int:
    return padded_vocab_size(layout.run.model.vocab_size, layout.tp_size) // layout.tp_size


def _splits(layout: RankLayout) -> bool:
    return layout.run.parallel.pipeline_schedule in ("zb-h1", "zbv")
