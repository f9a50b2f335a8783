"""Section `parallel`: how a run lies on its ranks."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megalite.config.section import NonNegativeInt, PositiveInt, Section


class ParallelConfig(Section):
    """How the model is spread over ranks; data parallelism takes what remains of the world."""

    tp_size: PositiveInt = Field(1, description="Ranks that share each layer (tensor parallelism).")
    cp_size: PositiveInt = Field(
        1, description="Ranks that each sample's sequence is cut over (context parallelism)."
    )
    context_attention: Literal["gather", "ring", "heads"] = Field(
        "gather",
        description="How these attend to each other's keys and values: all gathered (fast), going round a "
        "ring (small), or whole sequences for a part of the heads each (all-to-all).",
    )
    pp_size: PositiveInt = Field(1, description="Stages that the layers are cut into (pipeline parallelism).")
    ep_size: PositiveInt = Field(
        1, description="Data-parallel ranks that share each layer's experts (expert parallelism); ZeRO-3."
    )
    sequence_parallel: bool = Field(
        True, description="Whether activations between layers are cut over tp along the sequence."
    )
    row_overlap_chunks: PositiveInt = Field(
        1,
        description="Sequence parallelism: pieces in which row layers' sums are scattered, each while the "
        "next is computed. Not with fp8, nor in layers with adapters.",
    )
    share_node_memory: bool = Field(
        True,
        description="CPU: ranks of a node exchange tensors through memory that they share, not sockets.",
    )
    pipeline_schedule: Literal["1f1b", "afab", "interleaved", "zb-h1", "zbv"] = Field(
        "1f1b",
        description="Order of a stage's work: one forward one backward, all forward all backward, 1F1B over "
        "several chunks, or without waiting by a split backward, in one chunk (ZB-H1) or two (ZBV).",
    )
    num_chunks: PositiveInt | None = Field(
        None,
        description="Chunks of layers per rank; null means 2 for interleaved and zbv, 1 for others.",
    )
    layers_per_stage: list[PositiveInt] | None = Field(
        None,
        min_length=1,
        description="Layers of each stage, of all pp_size x num_chunks in their order, such as fewer for the "
        "last, which has the head; null cuts them evenly.",
    )
    weight_gradient_input: Literal["gather", "keep"] = Field(
        "gather",
        description="Split backward, sequence parallelism: inputs that were gathered over tp are gathered "
        "again for the weights' gradients, or kept until then (tp_size times the memory).",
    )
    parameter_gathering: Literal["step", "micro_batch"] = Field(
        "step", description="ZeRO-3: gather a stage's parameters once per step (fast) or micro batch (small)."
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="Activations computed again in backward: none, attention only, or whole layers."
    )
    offload_activations: bool = Field(
        False,
        description="Recompute full: whether the inputs of layers wait for backward in host memory.",
    )
    mlp_tile_tokens: NonNegativeInt = Field(
        0,
        description="Tokens that go through a feed-forward layer at a time, for samples so long that its "
        "inner activations would not fit; backward computes each tile again. 0 means all at once.",
    )

    @model_validator(mode="after")
    def _what_waits_is_the_input_of_layers(self) -> Self:
        if self.offload_activations and self.recompute != "full":
            raise ValueError(
                f"offload_activations keeps the inputs of layers, and recompute {self.recompute!r} keeps "
                "more: set parallel.recompute=full"
            )
        return self
