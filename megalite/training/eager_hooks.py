"""ZeRO-3's hooks without torch's compiler, which nothing here lets near them.

DeepSpeed keeps the compiler out of them by decorators of torch's, and these import it to tell it so: more
than a second of a core per rank, in a run that compiles nothing. Read from version 0.19.8.
"""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
KEPT_OUT = ("reset_step", "fetch_sub_module", "_PartitionedParameterCoordinator__release_param")


def leave_compiler_out(offload: ModuleType, coordinator: type) -> None:
    """Let DeepSpeed's hooks be the functions that they are written as, in all engines made from then on.

    Again it changes nothing. Layers that torch.compile makes with their hooks need these kept out: so it is
    called where an engine of ours is made, none of whose modules are compiled.

    offload: its module that hangs them on modules. coordinator: its class that they call.
    """
    if isinstance(offload.torch, _TorchWithoutCompiler):
        return
    offload.torch = _TorchWithoutCompiler()  # type: ignore[attr-defined]
    for name in KEPT_OUT:
        method = getattr(coordinator, name)
        setattr(coordinator, name, getattr(method, "__wrapped__", method))


class _TorchWithoutCompiler:
    """torch, to a module that decorates with `torch.compiler.disable`; torch itself stays as it is."""

    def __init__(self) -> None:
        self.compiler = SimpleNamespace(is_compiling=torch.compiler.is_compiling, disable=_unchanged)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _unchanged(function: Function) -> Function:
    return function
