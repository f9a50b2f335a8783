"""Stand-ins for kernels that need a GPU: they note how they are called, and compute by the formula.

So they show the call and not the kernel, which tests/gpu/test_foreign_kernels.py runs where it is. What they
take by position is compared with the packages' sources in tests/kernels/test_foreign.py.
"""

import sys
from types import ModuleType
from typing import Any

import torch

Calls = list[tuple[Any, ...]]


def _stand_in(monkeypatch: Any, name: str, **contents: Any) -> None:
    """Put a module in the place of one that is imported."""
    for path in (name[:end] for end in range(1, len(name)) if name[end] == "."):
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def stand_in_for_ligers_norm(monkeypatch: Any) -> Calls:
    """Shapes and what else is given to LigerRMSNormFunction, call by call."""
    calls: Calls = []

    class LigerRMSNormFunction:
        @staticmethod
        def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):  # noqa: N803
            calls.append((tuple(X.shape), tuple(W.shape), eps, offset, casting_mode, in_place, row_mode))
            return X * (X.square().mean(-1, keepdim=True) + eps).rsqrt() * (W + offset)

    _stand_in(monkeypatch, "liger_kernel.ops.rms_norm", LigerRMSNormFunction=LigerRMSNormFunction)
    return calls


def stand_in_for_ligers_gating(monkeypatch: Any) -> Calls:
    """Shapes that are given to LigerSiLUMulFunction, call by call."""
    calls: Calls = []

    class LigerSiLUMulFunction:
        @staticmethod
        def apply(a, b):
            calls.append((tuple(a.shape), tuple(b.shape)))
            return a * torch.sigmoid(a) * b

    _stand_in(monkeypatch, "liger_kernel.ops.swiglu", LigerSiLUMulFunction=LigerSiLUMulFunction)
    return calls


def stand_in_for_apexs_adam(monkeypatch: Any) -> Calls:
    """Of amp_C.multi_tensor_adam, by call: how many tensors, and the numbers after the learning rate.

    By csrc/multi_tensor_adam.cu, mode 0 adds decay to the gradient, as Adam with L2 does, and 1 does not.
    """
    calls: Calls = []

    def multi_tensor_adam(chunk, flag, lists, lr, beta1, beta2, eps, step, mode, bias_correction, decay):
        assert flag.dtype == torch.int32 and len({len(kind) for kind in lists}) == 1 and chunk > 0
        calls.append((len(lists[0]), beta1, beta2, eps, step, mode, bias_correction, decay))
        for g, p, m, v in zip(*lists, strict=True):
            gradient = g + decay * p if mode == 0 else g
            m.copy_(beta1 * m + (1 - beta1) * gradient)
            v.copy_(beta2 * v + (1 - beta2) * gradient * gradient)
            unbiased = [1 - beta**step if bias_correction else 1.0 for beta in (beta1, beta2)]
            move = (m / unbiased[0]) / ((v / unbiased[1]).sqrt() + eps)
            p.sub_(lr * (move + decay * p if mode else move))

    _stand_in(monkeypatch, "amp_C", multi_tensor_adam=multi_tensor_adam)
    return calls
