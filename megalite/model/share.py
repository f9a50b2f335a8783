"""What of a decoder a pipeline stage holds."""

from dataclasses import dataclass

from megalite.config.model import ModelConfig


@dataclass(frozen=True)
class StageShare:
    """A contiguous part of the model: which decoder layers, and whether either end.

    Attributes:
        layers: numbers of the decoder layers.
        has_embedding: it takes token ids, and begins with the embedding.
        has_head: it ends with the last norm, the head and the loss.
        has_other_end: the same rank holds another share with the other end: a tied table is there once.
    """

    layers: range
    has_embedding: bool = True
    has_head: bool = True
    has_other_end: bool = False

    @classmethod
    def whole(cls, config: ModelConfig) -> "StageShare":
        """All of a model."""
        return cls(range(config.num_hidden_layers))
