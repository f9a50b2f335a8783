"""Whether all that one rank says has its counterpart elsewhere, in one order: logs are compared, not played.

Ranks that do the same share one log, so that few comparisons stand for many ranks.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

from megalite.dryrun.log import Call, Exchange, Log, Members, Passage
from megalite.dryrun.roster import Roster

Said = tuple[Passage, str]  # and where


def faults_of_groups(roster: Roster) -> Iterator[str]:
    """Groups that ranks make in another order than most, or see with other members."""
    usual, _ = Counter(map(id, roster.orders)).most_common(1)[0]
    order = next(order for order in roster.orders if id(order) == usual)
    for rank, own in enumerate(roster.orders):
        if own is order or own == order:
            continue
        pairs = enumerate(zip_longest(own, order))
        index, (mine, theirs) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        yield (
            f"rank {rank} makes {_described(mine)} as its group number {index + 1}, where other ranks make "
            f"{_described(theirs)}: all ranks must make all groups in one order"
        )
    for rank, groups in enumerate(roster.groups):
        for name, members in groups.items():
            strange = next((m for m in members if roster.groups[m].get(name) is not members), None)
            if strange is not None:
                other = roster.groups[strange].get(name)
                yield (
                    f"rank {rank} has {_described(members)} as its group {name}, of which rank {strange} "
                    f"has {_described(other)}"
                )


class Matching:
    """The logs of all ranks, by what they say to whom.

    Args:
        logs: of each rank; one object where ranks do the same.
        roster: their groups.
    """

    def __init__(self, logs: Sequence[Log], roster: Roster) -> None:
        self.logs, self.roster = logs, roster
        by_log = {id(log): log for log in logs}
        self._calls = {key: _calls_of(log) for key, log in by_log.items()}
        self._said = {key: _said_in(log) for key, log in by_log.items()}
        self._compared: dict[tuple, int | None] = {}

    def faults(self) -> Iterator[str]:
        """One line for each group or pair of ranks that differ, at their first difference."""
        yield from self._faults_of_calls()
        yield from self._faults_of_passages()

    def _faults_of_calls(self) -> Iterator[str]:
        seen: set[int] = set()
        for groups in self.roster.groups:
            for name, members in groups.items():
                if id(members) not in seen:
                    seen.add(id(members))
                    yield from self._faults_of_group(name, members)

    def _faults_of_group(self, name: str, members: Members) -> Iterator[str]:
        keys = [id(self.logs[rank]) for rank in members]
        if len(set(keys)) == 1:
            return
        like = Counter(tuple(call.sign for call in self._calls_in(key, name)) for key in set(keys))
        if len(like) == 1:
            return
        signs = {key: tuple(call.sign for call in self._calls_in(key, name)) for key in set(keys)}
        (usual, _), *_ = Counter(signs[key] for key in keys).most_common()
        standard = next(key for key in keys if signs[key] == usual)
        for rank, key in zip(members, keys, strict=True):
            if signs[key] != usual:
                pairs = enumerate(zip_longest(self._calls_in(key, name), self._calls_in(standard, name)))
                index, (mine, theirs) = next((i, p) for i, p in pairs if _sign(p[0]) != _sign(p[1]))
                other = members[keys.index(standard)]
                yield (
                    f"collective {index + 1} of group {name} {_shortened(members)}: rank {rank} enters "
                    f"{_or_none(mine)}, rank {other} {_or_none(theirs)}"
                )

    def _calls_in(self, key: int, name: str) -> list[Call]:
        return self._calls[key].get(name, [])

    def _faults_of_passages(self) -> Iterator[str]:
        for rank, log in enumerate(self.logs):
            for (verb, name, offset), said in self._said[id(log)].items():
                members = self.roster.groups[rank][name]
                peer = members[(members.index(rank) + offset) % len(members)]
                back = "receive" if verb == "send" else "send"
                heard = self._said[id(self.logs[peer])].get((back, name, -offset % len(members)), [])
                key = (id(said), id(heard))
                if key not in self._compared or not heard:
                    self._compared[key] = _first_difference(said, heard)
                index = self._compared[key]
                if index is not None and (verb == "send" or not heard):
                    yield _told(verb, rank, peer, said, heard, index)


def _told(verb: str, rank: int, peer: int, said: list[Said], heard: list[Said], index: int) -> str:
    """Where two ranks differ in what passes between them."""
    other = "receives" if verb == "send" else "sends"
    mine, theirs = (_at(side, index) for side in (said, heard))
    to = "to" if verb == "send" else "from"
    back = "from" if verb == "send" else "to"
    own = f"{verb}s {mine} {to} rank {peer}" if mine else f"{verb}s nothing more {to} rank {peer}"
    there = f"{other} {theirs}" if theirs else f"{other} nothing more" if heard else f"never {other} anything"
    return f"transfer {index + 1} of rank {rank} {to} rank {peer}: rank {rank} {own}, which {there} {back} it"


def _at(side: list[Said], index: int) -> str:
    if index >= len(side):
        return ""
    passage, place = side[index]
    return f"{passage.tensor}, {passage.num_bytes:,} bytes ({place})"


def _first_difference(said: list[Said], heard: list[Said]) -> int | None:
    pairs = enumerate(zip_longest((p.sign for p, _ in said), (p.sign for p, _ in heard)))
    return next((i for i, (mine, theirs) in pairs if mine != theirs), None)


def _calls_of(log: Log) -> dict[str, list[Call]]:
    calls: dict[str, list[Call]] = defaultdict(list)
    for entry in log:
        if isinstance(entry, Call):
            calls[entry.group].append(entry)
    return calls


def _said_in(log: Log) -> dict[tuple[str, str, int], list[Said]]:
    """(verb, group, offset) -> what passes that way."""
    said: dict[tuple[str, str, int], list[Said]] = defaultdict(list)
    for entry in log:
        for passage in entry.passages if isinstance(entry, Exchange) else ():
            said[passage.verb, passage.group, passage.offset].append((passage, entry.place))
    return said


def _sign(call: Call | None) -> Any:
    return call and call.sign


def _or_none(call: Call | None) -> str:
    return "none any more" if call is None else str(call)


def _described(members: Members | None) -> str:
    return "none" if members is None else f"ranks {_shortened(members)}"


def _shortened(members: Members) -> str:
    """[0, 8, 16, ... 120]."""
    if len(members) <= 4:
        return str(list(members))
    return f"[{', '.join(map(str, members[:3]))}, ... {members[-1]}]"
