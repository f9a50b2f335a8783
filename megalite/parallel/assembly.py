"""Whole matrices of the slices that a stage's ranks hold, for work on them that needs each one whole.

Tensor parallelism gives a rank a box of a full parameter, and ZeRO a flat range of that box. An `Assembly`
knows of each rank which slices it holds, puts matrices together on the ranks that work on them, and gives
every rank back its slices of what they became. Only tensors travel, and all ranks take part in every
exchange, also those that hold nothing of a matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from megalite.parallel.context import Ranks
from megalite.parallel.shard import ShardSpec

Exchange = Literal["owner", "gather"]
Work = Callable[[torch.Tensor], torch.Tensor]  # [n, rows, columns] -> the same shape


class Part(NamedTuple):
    """What this rank holds of a parameter: elements [start, start + numel) of its flattened local tensor."""

    spec: ShardSpec
    start: int
    numel: int


class Slice(NamedTuple):
    """What one rank holds of a unit: a flat range of the box whose first element lies at (row, column).

    sends: whether it is the first of the ranks that hold just this.
    """

    start: int
    numel: int
    row: int
    column: int
    sends: bool


@dataclass
class Unit:
    """One matrix, or a stack that stays together: of a parameter's experts those of one rank of ep.

    Attributes:
        parameter: its index.
        shape: [n, rows, columns], whole.
        box_shape: of the part that tensor parallelism leaves a rank.
        slices: by rank, of those that hold something.
    """

    parameter: int
    shape: tuple[int, ...]
    box_shape: tuple[int, ...]
    slices: dict[int, Slice] = field(default_factory=dict)

    @property
    def cost(self) -> int:
        """Multiply-adds of a Newton-Schulz iteration: n s^2 (2 l + s), s the short and l the long side."""
        n, *sides = self.shape
        return n * min(sides) ** 2 * (2 * max(sides) + min(sides))

    def whole(self, pieces: dict[int, torch.Tensor]) -> torch.Tensor:
        """The unit from the slices of the ranks that send, by rank."""
        some = next(iter(pieces.values()))
        whole = some.new_empty(self.shape)
        boxes: dict[tuple[int, int], torch.Tensor] = {}
        for rank, piece in pieces.items():
            held = self.slices[rank]
            corner = (held.row, held.column)
            box = boxes.setdefault(corner, some.new_empty(prod(self.box_shape)))
            box[held.start : held.start + held.numel] = piece
        for (row, column), box in boxes.items():
            self._box(whole, row, column).copy_(box.view(self.box_shape))
        return whole

    def cut(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's slice of the whole unit, flat."""
        held = self.slices[rank]
        flat = self._box(whole, held.row, held.column).reshape(-1)
        return flat[held.start : held.start + held.numel]

    def _box(self, whole: torch.Tensor, row: int, column: int) -> torch.Tensor:
        _, rows, columns = self.box_shape
        return whole[:, row : row + rows, column : column + columns]


class Assembly:
    """Makes matrices whole and cuts them again, over the ranks of one stage; collective from its birth on.

    Args:
        parts: what this rank holds of each parameter, the same parameters in the same order on all ranks.
        ranks: those of the stage.
        device: where tensors travel.
        exchange: "owner": each unit is worked on by one rank, the loads balanced by `Unit.cost`; two
            all-to-alls, each of what the ranks hold. "gather": by each rank that holds a part of it; an
            all-gather per parameter. Both do the same arithmetic on the same shapes.
    """

    def __init__(
        self, parts: Sequence[Part], ranks: Ranks, device: torch.device, exchange: Exchange = "owner"
    ) -> None:
        self.parts, self.ranks, self.device, self.exchange = list(parts), ranks, device, exchange
        self.units = units_of(self.parts, self._table())
        self.units_of_owner: list[list[Unit]] = [[] for _ in range(ranks.size)]
        owners = balance([unit.cost for unit in self.units], ranks.size)
        for unit, owner in zip(self.units, owners, strict=True):
            self.units_of_owner[owner].append(unit)

    def _table(self) -> list[list[list[int]]]:
        """Of each rank and parameter: start and numel of its range, entry, row and column of its box."""
        mine = torch.tensor(
            [[p.start, p.numel, *_three(p.spec.box_start, 0)] for p in self.parts], dtype=torch.int64
        ).view(len(self.parts), 5)
        if self.ranks.size == 1:
            return [mine.tolist()]
        mine = mine.to(self.device)
        everyone = mine.new_empty(self.ranks.size * len(self.parts), 5)
        dist.all_gather_into_tensor(everyone, mine, group=self.ranks.group)
        return everyone.view(self.ranks.size, len(self.parts), 5).tolist()

    def apply(self, slices: Sequence[torch.Tensor], work: Work) -> list[torch.Tensor]:
        """This rank's slices [numel] of work(unit), for its slices of the units; by parameter."""
        run = self._by_owners if self.exchange == "owner" else self._by_holders
        return run(slices, work)

    def _by_owners(self, slices: Sequence[torch.Tensor], work: Work) -> list[torch.Tensor]:
        me, everyone = self.ranks.rank, range(self.ranks.size)
        owned = self.units_of_owner[me]
        sent = [[slices[u.parameter] for u in units if _sends(u, me)] for units in self.units_of_owner]
        sizes = [[u.slices[rank].numel for u in owned if _sends(u, rank)] for rank in everyone]
        received = self._all_to_all(sent, sizes, slices)
        pieces: dict[int, dict[int, torch.Tensor]] = {index: {} for index in range(len(owned))}
        for rank, tensors in enumerate(received):
            senders = [index for index, unit in enumerate(owned) if _sends(unit, rank)]
            for index, tensor in zip(senders, tensors, strict=True):
                pieces[index][rank] = tensor
        results = [work(unit.whole(pieces[index])) for index, unit in enumerate(owned)]
        back = [
            [u.cut(whole, rank) for u, whole in zip(owned, results, strict=True) if rank in u.slices]
            for rank in everyone
        ]
        held = [[u for u in units if me in u.slices] for units in self.units_of_owner]
        returned = self._all_to_all(back, [[u.slices[me].numel for u in units] for units in held], slices)
        changed = [tensor[:0] for tensor in slices]
        for units, tensors in zip(held, returned, strict=True):
            for unit, tensor in zip(units, tensors, strict=True):
                changed[unit.parameter] = tensor
        return changed

    def _all_to_all(
        self, sent: list[list[torch.Tensor]], sizes: list[list[int]], like: Sequence[torch.Tensor]
    ) -> list[list[torch.Tensor]]:
        """Tensors to each rank; from each rank tensors of these sizes."""
        if self.ranks.size == 1:
            return sent
        outgoing = torch.cat([like[0][:0], *(tensor for tensors in sent for tensor in tensors)])
        into = [sum(numels) for numels in sizes]
        incoming = outgoing.new_empty(sum(into))
        out = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
        dist.all_to_all_single(incoming, outgoing, into, out, group=self.ranks.group)
        return [list(whole.split(numels)) for whole, numels in zip(incoming.split(into), sizes, strict=True)]

    def _by_holders(self, slices: Sequence[torch.Tensor], work: Work) -> list[torch.Tensor]:
        me = self.ranks.rank
        changed = []
        for index, mine in enumerate(slices):
            units = [unit for unit in self.units if unit.parameter == index]
            rows = self._gathered(mine, max(s.numel for unit in units for s in unit.slices.values()))
            unit = next((unit for unit in units if me in unit.slices), None)
            if unit is None:
                changed.append(mine[:0])
                continue
            pieces = {r: rows[r][: s.numel] for r, s in unit.slices.items() if s.sends}
            changed.append(unit.cut(work(unit.whole(pieces)), me))
        return changed

    def _gathered(self, mine: torch.Tensor, longest: int) -> torch.Tensor:
        """The slices of all ranks [ranks, longest], each at the beginning of its row."""
        padded = mine.new_zeros(longest)
        padded[: mine.numel()] = mine
        if self.ranks.size == 1:
            return padded.view(1, -1)
        everyone = padded.new_empty(self.ranks.size * longest)
        dist.all_gather_into_tensor(everyone, padded, group=self.ranks.group)
        return everyone.view(self.ranks.size, longest)


def units_of(parts: Sequence[Part], table: Sequence[Sequence[Sequence[int]]]) -> list[Unit]:
    """The units of a stage, the same on all its ranks; see `Assembly` for the table.

    Raises ValueError where the ranks together do not hold each element of a unit once, copies aside.
    """
    units: dict[tuple[int, int], Unit] = {}
    sent: set[tuple[int, ...]] = set()
    for rank, rows in enumerate(table):
        for index, (start, numel, entry, row, column) in enumerate(rows):
            if not numel:
                continue
            box = _three(parts[index].spec.local_shape, 1)
            whole = (box[0], *_three(parts[index].spec.full_shape, 1)[1:])
            unit = units.setdefault((index, entry), Unit(index, whole, box))
            held = (index, entry, start, numel, row, column)
            unit.slices[rank] = Slice(start, numel, row, column, sends=held not in sent)
            sent.add(held)
    for (index, _), unit in units.items():
        numel = sum(s.numel for s in unit.slices.values() if s.sends)
        if numel != prod(unit.shape):
            name = parts[index].spec.name
            raise ValueError(f"{name}: the ranks of a stage hold {numel} of {prod(unit.shape)} elements")
    return [units[key] for key in sorted(units)]


def balance(costs: Sequence[int], num_ranks: int) -> list[int]:
    """An owner for each, so that no rank has much more to do: the dearest first, to the least busy."""
    loads, owners = [0] * num_ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


def _sends(unit: Unit, rank: int) -> bool:
    return rank in unit.slices and unit.slices[rank].sends


def _three(sizes: Sequence[int], first: int) -> tuple[int, ...]:
    """Of a matrix as of a stack of one."""
    return (first, *sizes) if len(sizes) == 2 else tuple(sizes)
