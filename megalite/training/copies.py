"""What several ranks hold copies of must be the same on all of them, to the last bit.

Weights and moments below ZeRO-3 have a copy per data-parallel rank, norms one per tensor-parallel rank, tied
embeddings one per end of the pipeline. The same arithmetic keeps them alike; a flipped bit in a memory, or a
device that computes wrongly now and then, does not, and training would go on with two models.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch

from megalite.checkpoint.format import Piece, Region
from megalite.error import UserError
from megalite.exit_status import FAILED
from megalite.training.checkpoints import live_pieces
from megalite.training.engine import StageEngine
from megalite.training.world import gather

WORDS = {4: torch.int32, 2: torch.int16}  # by the bytes of an element


class CopiesError(UserError):
    """Ranks hold different numbers where they are to hold the same; on other nodes they may not."""

    exit_status = FAILED


class Copies:
    """Compares a stage's state with the same parts on other ranks; collective."""

    def __init__(self, engine: StageEngine) -> None:
        self.engine = engine
        holders = Counter(
            key for keys in gather(list({_part(p) for p in live_pieces(engine)})) for key in keys
        )
        self._shared = {part for part, number in holders.items() if number > 1}

    def check(self, step: int) -> None:
        """Raise CopiesError, on all ranks, where a part differs; it names the first one and its ranks."""
        pieces = [piece for piece in live_pieces(self.engine) if _part(piece) in self._shared]
        sums = torch.stack([checksum(piece.tensor) for piece in pieces]).tolist() if pieces else []
        mine = {_part(piece): number for piece, number in zip(pieces, sums, strict=True)}
        found: dict[Part, dict[int, int]] = defaultdict(dict)
        for rank, theirs in enumerate(gather(mine)):
            for part, number in theirs.items():
                found[part][rank] = number
        for part, sum_of in sorted(found.items(), key=str):
            if len(set(sum_of.values())) > 1:
                raise CopiesError(f"step {step}: {_describe(part, sum_of)}")


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of its 16- or 32-bit words, int64: one flipped bit changes it by a power of two."""
    return tensor.detach().view(WORDS[tensor.element_size()]).sum(dtype=torch.int64)


class Part(NamedTuple):
    """What is the same on all ranks that hold it."""

    kind: str
    name: str
    region: Region
    dtype: torch.dtype


def _part(piece: Piece) -> Part:
    return Part(piece.kind, piece.name, piece.region, piece.tensor.dtype)


def _describe(part: Part, sum_of: dict[int, int]) -> str:
    """sum_of: by rank."""
    usual, number = Counter(sum_of.values()).most_common(1)[0]
    what = f"{part.kind} {part.name}"
    if 2 * number <= len(sum_of):
        return (
            f"{what} is not the same on ranks {_listed(sum_of)}, which hold copies: one of their devices or "
            "memories is at fault: find it with guard.check_copies_every_steps=1 on other nodes"
        )
    others = _listed(rank for rank, value in sum_of.items() if value != usual)
    return (
        f"{what} on rank {others} is not that of the other {number} ranks that hold a copy: its device or "
        "memory is at fault: go on from the newest checkpoint without it"
    )


def _listed(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))
