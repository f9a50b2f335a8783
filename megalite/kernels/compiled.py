"""Parts of a layer through torch.compile, which makes each one pass over memory forward and one backward.

What lies between matrix products is compiled, and not the layer around it: there autograd functions wait for
other ranks, leave gradients for later and find weights that ZeRO-3 has gathered, and each would end a graph.
So parameters keep their names, and hooks of modules are called as ever.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_path
from typing import ParamSpec

import torch

Inputs = ParamSpec("Inputs")


def compiled_in_training(
    formula: Callable[Inputs, torch.Tensor], otherwise: Callable[Inputs, torch.Tensor]
) -> Callable[Inputs, torch.Tensor]:
    """`formula`, compiled at its first use, where autograd records; elsewhere `otherwise`, which is the same.

    Micro batches in training have one shape, for which it is compiled. Evaluation and generation come in
    many, and a graph for each, or one for all, would take longer than it saves.
    """
    compiled = torch.compile(formula, dynamic=False)

    def part(*args: Inputs.args, **kwargs: Inputs.kwargs) -> torch.Tensor:
        return (compiled if torch.is_grad_enabled() else otherwise)(*args, **kwargs)

    return part


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile needs on a device and does not find; None where all is there."""
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "a C++ compiler (CXX, else g++)"
        if not Path(get_path("include"), "Python.h").exists():
            return "Python's headers (Python.h)"
    elif device.type == "cuda" and find_spec("triton") is None:
        return "the package triton"
    return None
