"""Which ranks hold up the others, from what each said and what was found of those that said nothing."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from megalite.watch.marks import Mark
from megalite.watch.stacks import FROZEN

LISTED_RANKS = 8  # more are counted only


@dataclass(frozen=True)
class Account:
    """What is known of a rank when nothing moves.

    name: as people find it.
    mark: the latest that was heard of.
    frame: what its main thread executes; None if it did not answer.
    waits: whether that is a wait for other ranks.
    state: of its process, as another rank of its node found it; empty if none could.
    """

    name: str
    mark: Mark
    frame: str | None = None
    waits: bool = False
    state: str = ""


def verdict(accounts: Mapping[int, Account], beyond: str) -> str:
    """One line that names who hangs and where. beyond: which limit was exceeded.

    Who does not answer is to blame before who does, and who waits for others is not while anybody does
    something else; of those that remain, the ones that are furthest behind.
    """
    silent = [rank for rank, account in accounts.items() if account.frame is None]
    busy = [rank for rank, account in accounts.items() if not account.waits]
    accused = _furthest_behind(accounts, silent or busy or list(accounts))
    first = accounts[accused[0]]
    hang = "hangs" if len(accused) == 1 else "hang"
    what = first.state or FROZEN if silent else f"{hang} in {_frame(accounts, accused)}"
    waiting = "" if silent or busy else ", where each rank waits for others"
    return f"{_names(accounts, accused)} {what} at {first.mark}{waiting}: {beyond}"


def _furthest_behind(accounts: Mapping[int, Account], ranks: list[int]) -> list[int]:
    lowest = min(accounts[rank].mark.number for rank in ranks)
    return sorted(rank for rank in ranks if accounts[rank].mark.number == lowest)


def _names(accounts: Mapping[int, Account], accused: list[int]) -> str:
    if len(accused) == len(accounts) > 1:
        return f"all {len(accused)} ranks"
    more = ", ".join(map(str, accused[1 : 1 + LISTED_RANKS]))
    ellipsis = ", ..." if len(accused) > 1 + LISTED_RANKS else ""
    others = f" and {len(accused) - 1} more ({more}{ellipsis})" if more else ""
    return accounts[accused[0]].name + others


def _frame(accounts: Mapping[int, Account], accused: list[int]) -> str:
    """The most frequent frame of these ranks."""
    frames = Counter(accounts[rank].frame for rank in accused)
    return str(frames.most_common(1)[0][0])
