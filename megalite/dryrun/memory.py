"""Memory of fake tensors: how many bytes live at a time, were they real."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_READ, _DEVICE = torch.ops.aten._local_scalar_dense.default, torch.ops.prim.device.default


class LiveBytes(TorchDispatchMode):
    """Counts the storages on a device that live at a time, each from the operation that made it to its end.

    A number that the host reads is 1, an integer 0: fake tensors have none.

    Attributes:
        now: bytes that live.
        peak: the most that lived.
    """

    def __init__(self, device: torch.device, place: Callable[[], str]) -> None:
        super().__init__()
        self.device, self.now, self.peak, self.peak_place = device, 0, 0, ""
        self._place = place
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is _READ:
            return 1.0 if args[0].is_floating_point() else 0
        if function is _DEVICE:  # asked for more often than all else
            return args[0].fake_device
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == self.device:
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        num_bytes = storage.nbytes()
        self._alive[key] = weakref.ref(storage, partial(self._forget, key, num_bytes))
        self.now += num_bytes
        if self.now > self.peak:
            self.peak, self.peak_place = self.now, self._place()

    def _forget(self, key: int, num_bytes: int, storage: weakref.ref) -> None:
        del self._alive[key]
        self.now -= num_bytes
