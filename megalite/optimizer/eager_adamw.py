"""torch's AdamW, without torch's compiler.

torch keeps its compiler out of optimizers by decorators, and the first call of each imports it to tell it so:
more than a second of a core per rank, in a run that compiles nothing. Here what they decorate is called.
"""

from collections.abc import Callable
from inspect import unwrap
from typing import Any

import torch


class EagerAdamW(torch.optim.AdamW):
    """The same numbers, groups and state; its steps are not to be differentiated."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch."""
        unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """See torch."""
        return unwrap(torch.optim.AdamW.step)(self, closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See torch."""
        unwrap(torch.optim.Optimizer.zero_grad)(self, set_to_none)
