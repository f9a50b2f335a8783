"""All ranks' logs played in order, by the strictest rules: each entry is waited for where it stands.

A collective ends when all members have entered it, an exchange when each of its tensors has met its other
end; nothing is buffered. What comes to its end so does so too where ranks go on before an entry has ended.
"""

from collections.abc import Sequence

from megalite.dryrun.log import Call, Entry, Exchange, Log, Members, Passage
from megalite.dryrun.roster import Roster

Way = tuple[int, int, str]  # from, to, group


class Play:
    """Where each rank is in its log, and who waits for whom."""

    def __init__(self, logs: Sequence[Log], roster: Roster) -> None:
        self.logs, self.groups = logs, roster.groups
        self._next = [0] * len(logs)
        self._entered: dict[int, int] = {}  # by a group's identity
        self._waiting: dict[tuple[str, Way], list[int]] = {}  # ranks that have a verb open on a way
        self._open = [0] * len(logs)  # tensors of an exchange that have not met their other end

    def run(self) -> str | None:
        """Play to the end. Returns who waits for whom where it is not reached."""
        ready = list(range(len(self.logs)))
        while ready:
            rank = ready.pop()
            if self._next[rank] < len(self.logs[rank]):
                entry = self.logs[rank][self._next[rank]]
                enter = self._enter if isinstance(entry, Call) else self._exchange
                ready += enter(rank, entry)  # type: ignore[arg-type]
        stuck = [rank for rank in range(len(self.logs)) if self._entry(rank) is not None]
        return self._chain(stuck) if stuck else None

    def _entry(self, rank: int) -> Entry | None:
        at, log = self._next[rank], self.logs[rank]
        return log[at] if at < len(log) else None

    def _enter(self, rank: int, call: Call) -> Sequence[int]:
        """The ranks that may go on."""
        members = self.groups[rank][call.group]
        entered = self._entered.get(id(members), 0) + 1
        is_whole = entered == len(members)
        self._entered[id(members)] = 0 if is_whole else entered
        if not is_whole:
            return ()
        for member in members:
            self._next[member] += 1
        return members

    def _exchange(self, rank: int, exchange: Exchange) -> Sequence[int]:
        self._open[rank] = len(exchange.passages)
        going = []
        for passage in exchange.passages:
            way = self._way(rank, passage)
            back = "receive" if passage.verb == "send" else "send"
            others = self._waiting.get((back, way))
            if not others:
                self._waiting.setdefault((passage.verb, way), []).append(rank)
                continue
            for end in (others.pop(0), rank):
                self._open[end] -= 1
                if not self._open[end]:
                    self._next[end] += 1
                    going.append(end)
        return going

    def _way(self, rank: int, passage: Passage) -> Way:
        peer = self._peer(rank, passage)
        return (rank, peer, passage.group) if passage.verb == "send" else (peer, rank, passage.group)

    def _peer(self, rank: int, passage: Passage) -> int:
        members: Members = self.groups[rank][passage.group]
        return members[(members.index(rank) + passage.offset) % len(members)]

    def _chain(self, stuck: list[int]) -> str:
        """From one rank that waits to the one that it waits for, until one comes again or has ended."""
        chain = [stuck[0]]
        while True:
            awaited = self._awaited(chain[-1])
            if awaited is None or awaited in chain:
                break
            chain.append(awaited)
        if awaited is not None:
            chain = chain[chain.index(awaited) :]  # the circle, without the way to it
        told = "; ".join(self._waits(rank) for rank in chain)
        return f"{len(stuck)} of {len(self.logs)} ranks wait for ever: {told}"

    def _awaited(self, rank: int) -> int | None:
        entry = self._entry(rank)
        if isinstance(entry, Call):
            members = self.groups[rank][entry.group]
            return next(member for member in members if not self._is_in(member, members))
        if isinstance(entry, Exchange):
            return next(
                self._peer(rank, passage)
                for passage in entry.passages
                if rank in self._waiting.get((passage.verb, self._way(rank, passage)), [])
            )
        return None

    def _is_in(self, rank: int, members: Members) -> bool:
        entry = self._entry(rank)
        return isinstance(entry, Call) and self.groups[rank][entry.group] is members

    def _waits(self, rank: int) -> str:
        entry = self._entry(rank)
        if entry is None:
            return f"rank {rank} has ended its step"
        if isinstance(entry, Call):
            return f"rank {rank} is in {entry} over {entry.group} and waits for rank {self._awaited(rank)}"
        awaited = self._awaited(rank)
        passage = next(p for p in entry.passages if self._peer(rank, p) == awaited)
        doing = "send" if passage.verb == "send" else "receive"
        return f"rank {rank} is to {doing} {passage.tensor} ({entry.place}) and waits for rank {awaited}"
