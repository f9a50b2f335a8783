"""The weights in a checkpoint: checked to be exactly a model's, and rounded as they are read."""

from pathlib import Path

import torch

from megalite.checkpoint.format import CONFIG, CheckpointError
from megalite.checkpoint.load import TensorReader
from megalite.checkpoint.tensor_file import DTYPE_NAMES
from megalite.config.model import ModelConfig
from megalite.model.table import model_table

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES}  # float32, bfloat16, float16


class Weights:
    """A model's weights in a checkpoint, read one tensor at a time.

    Args:
        checkpoint: the folder of a step.
        model: whose tensors they must be.
        dtype: to round to: a key of DTYPES.

    Raises CheckpointError unless the checkpoint holds exactly the weights of `model`.
    """

    def __init__(self, checkpoint: Path, model: ModelConfig, dtype: str = "float32") -> None:
        self.checkpoint, self.model, self.dtype = Path(checkpoint), model, dtype
        self.shapes = {row.name: row.shape for row in model_table(model)}  # in the order of the layers
        self._reader = TensorReader(checkpoint)
        self._check_shapes()

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor. Raises CheckpointError when it holds a number that the dtype does not reach."""
        full, dtype = self._reader.read("weight", name), DTYPES[self.dtype]
        rounded = full.to(dtype)
        if (rounded.isinf() & full.isfinite()).any():
            largest, limit = full[full.isfinite()].abs().max(), torch.finfo(dtype).max
            raise CheckpointError(
                f"weight {name} reaches {largest:.4g}, {dtype} ends at {limit:.4g}: use float32"
            )
        return rounded

    def _check_shapes(self) -> None:
        expected, stored = self.shapes, self._reader.manifest.shapes("weight")
        for name in [*expected, *stored]:
            if stored.get(name) != expected.get(name):
                there, here = (list(s[name]) if name in s else "absent" for s in (stored, expected))
                raise CheckpointError(
                    f"weight {name} is {there} in {self.checkpoint} and {here} in the model of its {CONFIG}"
                )
