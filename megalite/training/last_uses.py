"""When ZeRO-3 lets go of a parameter that it gathers once per step: after its last use there.

Read from DeepSpeed 0.19.8.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

OWN_NAME = "_PartitionedParameterCoordinator"


class LastUses:
    """The place in a step's trace of modules that uses each parameter last.

    DeepSpeed asks of each module that has run which of its parameters the rest of the step uses again, and
    walks that rest to find out: with n modules and m micro batches 2 (m n)^2 visits in the second step. Here
    the trace is read once, and again when another was recorded.
    """

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._trace: Sequence[nn.Module] = ()
        self._places: dict[int, int] = {}

    def answer(self) -> None:
        """Answer in DeepSpeed's place from now on."""
        setattr(self._coordinator, f"{OWN_NAME}__params_to_release", self.to_release)

    def to_release(self, module: nn.Module, step_id: int) -> set[int]:
        """Ids of a module's parameters that no later place of the trace uses; small ones stay for good."""
        trace = getattr(self._coordinator, f"{OWN_NAME}__submodule_order")
        if trace is not self._trace:
            self._trace = trace
            self._places = {p.ds_id: place for place, m in enumerate(trace) for p in _parameters(m)}
        released = (p.ds_id for p in _parameters(module) if not p.ds_persist)
        return {number for number in released if self._places.get(number, -1) < step_id}


def _parameters(module: Any) -> list[Any]:
    return [*module.parameters(recurse=False), *(p for _, p in module.ds_external_parameters())]
