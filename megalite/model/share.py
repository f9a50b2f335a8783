"""What of a decoder a pipeline stage, or one of its chunks, holds."""

from dataclasses import dataclass

from megalite.config.model import ModelConfig


@dataclass(frozen=True)
class StageShare:
    """A contiguous part of the model: which decoder layers, and whether either end.

    Attributes:
        layers: numbers of the decoder layers.
        has_embedding: it takes token ids, and begins with the embedding.
        has_head: it ends with the last norm, the head and the loss.
    """

    layers: range
    has_embedding: bool = True
    has_head: bool = True

    @classmethod
    def whole(cls, config: ModelConfig) -> "StageShare":
        """All of a model."""
        return cls(range(config.num_hidden_layers))
