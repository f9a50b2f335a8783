"""Muon (Jordan 2024; Liu 2025, arXiv 2502.16982) as a recipe: matrices step by orthogonalised momentum.

    m <- beta m + (1 - beta) g      u = (1 - beta) g + beta m with Nesterov, else m
    W <- (1 - rate decay) W - rate scale orthogonalize(u)

Momentum and decay act element by element on what ZeRO leaves a rank; for the rest each matrix is put together
from the slices of the stage's ranks. Query, key, value, gate and up are matrices of their own, and so is each
expert. Embedding, head, routers and vectors are stepped by AdamW.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from megalite.config.optimizer import OptimizerConfig
from megalite.kernels.adamw import AdamUpdate
from megalite.optimizer.adamw import AdamW
from megalite.optimizer.kinds import MOMENTUM, is_orthogonalized, kinds_of
from megalite.optimizer.newton_schulz import orthogonalize, scale_of
from megalite.optimizer.recipe import ParameterGroup
from megalite.optimizer.slices import MasterSlice
from megalite.optimizer.stepper import AdamWStepper
from megalite.parallel.assembly import Assembly, Part
from megalite.parallel.context import ParallelContext
from megalite.parallel.shard import ShardSpec, spec_of
from megalite.parallel.topology import STAGE_AXES

NUMBER = "matrix_group"  # key in a torch optimizer's parameter group: which of ours it is; None for AdamW's


class Muon:
    """Muon for hidden matrices, AdamW for the rest.

    Four groups: one matrix alone, another one's or others of AdamW's, the other matrices of Muon, and the
    vectors. Alone is a tied embedding, see `AdamW`. A stage without tables sets matrices of Muon apart in
    their place, since every stage must have as many groups.

    update: what computes AdamW's part, see kernels/adamw.py; None for torch.
    """

    def __init__(self, config: OptimizerConfig, update: AdamUpdate | None = None) -> None:
        self.config, self._update, self._adamw = config, update, AdamW(config)

    def kinds_of(self, name: str, full_shape: Sequence[int]) -> tuple[str, ...]:
        return kinds_of("muon", name, full_shape)

    def groups(self, parameters: Sequence[nn.Parameter]) -> list[ParameterGroup]:
        trained = [p for p in parameters if p.requires_grad]
        vectors = [p for p in trained if len(spec_of(p).full_shape) == 1]
        hidden = [p for p in trained if _is_hidden(p)]
        tables = [p for p in trained if len(spec_of(p).full_shape) > 1 and not _is_hidden(p)]
        tables.sort(key=lambda p: not spec_of(p).is_tied)
        others = tables[1:]
        alone, hidden = (tables[:1], hidden) if tables else (hidden[:1], hidden[1:])
        others, hidden = (others, hidden) if others else (hidden[:1], hidden[1:])
        groups = [
            *(self._group(number, members) for number, members in enumerate((alone, others, hidden))),
            self._group(3, vectors, weight_decay=0.0),
        ]
        return [group for group in groups if group.parameters]

    def _group(self, number: int, parameters: list[nn.Parameter], **settings: Any) -> ParameterGroup:
        is_muon = bool(parameters) and _is_hidden(parameters[0])
        return ParameterGroup(
            parameters,
            1.0 if is_muon else self.config.muon.adamw_learning_rate_factor,
            {"weight_decay": self.config.weight_decay, NUMBER: number if is_muon else None} | settings,
        )

    def build(self, groups: Sequence[ParameterGroup]) -> torch.optim.Optimizer:
        members = {group.settings[NUMBER]: group.parameters for group in groups}
        members.pop(None, None)
        return MuonWithAdamW([group.for_torch() for group in groups], members, self.config, self._update)

    def settle(
        self,
        optimizer: torch.optim.Optimizer,
        masters: Mapping[nn.Parameter, MasterSlice],
        context: ParallelContext,
    ) -> None:
        assert isinstance(optimizer, MuonWithAdamW)
        optimizer.settle(masters, context)

    def state_of(
        self, optimizer: torch.optim.Optimizer, flat: torch.Tensor, spec: ShardSpec
    ) -> dict[str, torch.Tensor]:
        if not is_orthogonalized(spec.name, spec.full_shape):
            return self._adamw.state_of(optimizer, flat, spec)
        state = optimizer.state[flat]
        if not state:
            state[MOMENTUM] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        return state

    def steps_of(self, state: dict[str, torch.Tensor]) -> int:
        return 0 if MOMENTUM in state else self._adamw.steps_of(state)

    def set_steps(self, state: dict[str, torch.Tensor], steps: int) -> None:
        if MOMENTUM not in state:
            self._adamw.set_steps(state, steps)


class _Batch(NamedTuple):
    """Matrices whose masters lie in the same tensor: where, None for those of which this rank has nothing."""

    masters: list[MasterSlice | None]
    assembly: Assembly


class MuonWithAdamW(AdamWStepper):
    """A torch optimizer whose groups with a number are Muon's; the others it steps as AdamW.

    members: the parameters of each of these groups, as they were before ZeRO put flat tensors in their place.

    Attributes:
        row_factors: [local rows], by the matrix that a step multiplies by it when it is done with it.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        members: Mapping[int, list[nn.Parameter]],
        config: OptimizerConfig,
        update: AdamUpdate | None = None,
    ) -> None:
        super().__init__(groups, config, update)
        self._members, self._settings = members, config.muon
        self.row_factors: Mapping[nn.Parameter, torch.Tensor] = {}
        self._batches: dict[int, list[_Batch]] = {number: [] for number in members}

    def settle(self, masters: Mapping[nn.Parameter, MasterSlice], context: ParallelContext) -> None:
        """Take note of where this rank's masters lie; collective, over each stage.

        What ZeRO-3 partitions over other ranks, experts over ep, it keeps in another tensor.
        """
        for number, members in sorted(self._members.items()):
            for axes in sorted({spec_of(p).averaged_over for p in members}):
                parameters = [p for p in members if spec_of(p).averaged_over == axes]
                mine = [masters.get(parameter) for parameter in parameters]
                parts = [
                    Part(spec_of(parameter), part.start if part else 0, part.numel if part else 0)
                    for parameter, part in zip(parameters, mine, strict=True)
                ]
                ranks, exchange = context[STAGE_AXES], self._settings.exchange
                assembly = Assembly(parts, ranks, context.device, exchange)
                self._batches[number].append(_Batch(mine, assembly))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step the groups that have tensors: DeepSpeed may give them one at a time."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if group[NUMBER] is None]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group[NUMBER] is not None and group["params"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        """Collective over the stage: its ranks walk all matrices of the group in the same order."""
        updates = {id(flat): self._update(flat, group) for flat in group["params"]}
        work = partial(orthogonalize, config=self._settings)
        for masters, assembly in self._batches[group[NUMBER]]:
            if any(part is not None and id(part.flat) not in updates for part in masters):
                continue  # of a tensor that has a call of its own
            nothing = torch.empty(0, dtype=torch.float32, device=assembly.device)
            slices = [part.view(updates[id(part.flat)]) if part else nothing for part in masters]
            for part, step in zip(masters, assembly.apply(slices, work), strict=True):
                if part is not None:
                    scale = scale_of(spec_of(part.parameter).full_shape, self._settings)
                    part.view(part.flat).sub_(step, alpha=group["lr"] * scale)
                    self._scale_rows(part)

    def _scale_rows(self, part: MasterSlice) -> None:
        factors = self.row_factors.get(part.parameter)
        if factors is not None:
            columns = spec_of(part.parameter).local_shape[-1]
            places = torch.arange(part.start, part.start + part.numel, device=factors.device)
            part.view(part.flat).mul_(factors[places // columns])

    def _update(self, flat: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Move the momentum, let the weights decay; what is to be orthogonalised."""
        gradient = torch.zeros_like(flat) if flat.grad is None else flat.grad
        state = self.state[flat]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(flat, memory_format=torch.preserve_format)
        momentum = state[MOMENTUM]
        momentum.lerp_(gradient, 1 - self._settings.momentum)
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        return gradient.lerp(momentum, self._settings.momentum) if self._settings.nesterov else momentum


def _is_hidden(parameter: nn.Parameter) -> bool:
    spec = spec_of(parameter)
    return is_orthogonalized(spec.name, spec.full_shape)
