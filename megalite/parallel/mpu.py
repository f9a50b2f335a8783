"""The model-parallel unit: what DeepSpeed asks about groups, and no more.

Deliberately absent: `initialize_sequence_parallel` and `get_sequence_*`. DeepSpeed takes their mere
presence for Ulysses, drops the model-parallel group, and gradient norm and overflow become local.
"""

from megalite.parallel.context import Group, ParallelContext
from megalite.parallel.topology import DATA_AXES, MODEL_AXES


class ModelParallelUnit:
    """The five methods that DeepSpeed calls on an `mpu`; to it, "model parallel" is pp x tp."""

    def __init__(self, context: ParallelContext) -> None:
        self._data, self._model = context[DATA_AXES], context[MODEL_AXES]

    def get_data_parallel_group(self) -> Group:
        """Ranks that hold the same slices: ZeRO partitions over them."""
        return self._data.group

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_model_parallel_group(self) -> Group:
        """Ranks that together hold one model: the gradient norm spans them."""
        return self._model.group

    def get_model_parallel_rank(self) -> int:
        """pp_rank * tp_size + tp_rank, unique in one model."""
        return self._model.rank

    def get_model_parallel_world_size(self) -> int:
        return self._model.size
