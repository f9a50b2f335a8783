"""What rank 0 makes of what all ranks found: faults, each with its node, and a table (no communication)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median_high
from typing import Any

from megalite.exit_status import MISTAKE, NODE
from megalite.preflight.fault import Fault, fault_of_nodes, spans, status_of
from megalite.preflight.inventory import differences

SLOW = 0.7  # a rank below this share of the median speed is slow

Values = Mapping[int, dict[str, Any]]  # rank -> what it found


@dataclass
class Verdict:
    """The findings of a job, as they come in.

    node_names: in the order of the ranks, for those that do not come; may be empty.
    """

    world_size: int
    local_world_size: int
    node_names: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    nodes: dict[int, str] = field(default_factory=dict)
    healths: Values = field(default_factory=dict)
    bandwidths: dict[str, list[float]] = field(default_factory=dict)

    @property
    def status(self) -> int:
        return status_of(self.faults)

    @property
    def bad_nodes(self) -> list[str]:
        """The nodes to do without; none where most are bad, since others would be no better."""
        bad = {node for fault in self.faults for node in fault.nodes}
        return sorted(bad) if 2 * len(bad) <= len(set(self.nodes.values()) | bad) else []

    def judge_arrivals(self, values: Values) -> None:
        """values: `node`, `inventory`, `unreadable`; or `mistake`, of a rank whose command line is wrong."""
        self.nodes = {rank: value["node"] for rank, value in values.items()}
        self._name_absent("has not come")
        mistaken = {rank: value["mistake"] for rank, value in values.items() if "mistake" in value}
        for mistake in dict.fromkeys(mistaken.values()):
            ranks = [rank for rank in mistaken if mistaken[rank] == mistake]
            where = "" if len(ranks) == len(values) else f" (ranks {spans(ranks)})"
            self.faults.append(Fault(MISTAKE, mistake + where))
        sound = {rank: value for rank, value in values.items() if "mistake" not in value}
        if sound:
            inventories = {rank: value["inventory"] for rank, value in sound.items()}
            self.faults += differences(inventories, self.nodes)
        self._judge_shared({rank: value["unreadable"] for rank, value in sound.items()})

    def judge_health(self, values: Values) -> None:
        """values: `problems`, `unreadable`, and of a rank with a device `device` and `flops_per_second`."""
        self.healths = values
        self._name_absent("is silent since it came", values)
        for rank, value in values.items():
            self.faults += [self._of_node(rank, problem) for problem in value["problems"]]
        self._judge_shared({rank: value["unreadable"] for rank, value in values.items()})
        without_gpu = [rank for rank, value in values.items() if value.get("device") == "cpu"]
        if len(without_gpu) < len(values):
            self.faults += [self._of_node(rank, "sees no GPU, and others do") for rank in without_gpu]
        self._name_slow({r: v["flops_per_second"] for r, v in values.items() if "flops_per_second" in v})

    def judge_groups(self, values: Values) -> None:
        """values: `bandwidths`, in bytes per second by group, `problems`, and `stuck`, a group or empty."""
        self._name_absent("is silent since its device was measured", values)
        for rank, value in values.items():
            told = [f"{self.place(rank)}: {problem}" for problem in value["problems"]]
            self.faults += [Fault(NODE, text) for text in told]  # either end may be the bad one
            for group, speed in value["bandwidths"].items():
                self.bandwidths.setdefault(group, []).append(speed)
                if speed == 0:
                    self.faults.append(self._of_node(rank, f"an all-reduce over {group} gave a wrong sum"))
        for group in dict.fromkeys(value["stuck"] for value in values.values() if value["stuck"]):
            self._name_stuck(group, [rank for rank, value in values.items() if value["stuck"] == group])

    def place(self, rank: int) -> str:
        """A rank and its node, where that is known: of one that has not come, from its neighbours."""
        return f"rank {rank} ({self.node_of(rank) or 'on an unknown node'})"

    def node_of(self, rank: int) -> str | None:
        at = rank // self.local_world_size
        neighbours = (self.nodes.get(r) for r in range(self.world_size) if r // self.local_world_size == at)
        given = self.node_names[at] if at < len(self.node_names) else None
        return self.nodes.get(rank) or given or next((node for node in neighbours if node), None)

    def _of_node(self, rank: int, text: str) -> Fault:
        node = self.node_of(rank)
        return Fault(NODE, f"{self.place(rank)}: {text}", (node,) if node else ())

    def _name_absent(self, what: str, values: Values | None = None) -> None:
        come = self.nodes if values is None else values
        absent = [rank for rank in range(self.world_size) if rank not in come]
        self.faults += [self._of_node(rank, what) for rank in absent]

    def _name_stuck(self, group: str, ranks: list[int]) -> None:
        nodes = sorted({self.nodes[rank] for rank in ranks})
        text = f"a collective over {group} did not end on ranks {spans(ranks)} ({', '.join(nodes)})"
        self.faults.append(Fault(NODE, text, tuple(nodes) if len(nodes) == 1 else ()))

    def _judge_shared(self, unreadable: Mapping[int, Mapping[str, str]]) -> None:
        names = dict.fromkeys(name for found in unreadable.values() for name in found)
        for name in names:
            bad = {self.nodes[rank]: found[name] for rank, found in unreadable.items() if name in found}
            self.faults += fault_of_nodes(name, bad, self.nodes.values())

    def _name_slow(self, speeds: Mapping[int, float]) -> None:
        middle = median_high(speeds.values()) if speeds else 0.0
        for rank, speed in speeds.items():
            if speed < SLOW * middle:
                told = f"{_tera(speed)} TFLOP/s in a matrix product, where the median is {_tera(middle)}"
                self.faults.append(self._of_node(rank, f"is slow: {told}"))


def table(verdict: Verdict) -> str:
    """What was found, a line per node and per kind of group."""
    lines = [f"{'node':<20} {'ranks':<12} {'device':<24} TFLOP/s, slowest and fastest rank"]
    for node in dict.fromkeys(verdict.nodes.values()):
        ranks = [rank for rank, where in verdict.nodes.items() if where == node]
        found = [verdict.healths[rank] for rank in ranks if rank in verdict.healths]
        devices = ", ".join(sorted({value["device"] for value in found if value.get("device")})) or "-"
        speeds = sorted(value["flops_per_second"] for value in found if "flops_per_second" in value)
        told = f"{_tera(speeds[0])} {_tera(speeds[-1])}" if speeds else "-"
        lines.append(f"{node:<20} {spans(ranks):<12} {devices:<24} {told}")
    if verdict.bandwidths:
        lines.append(f"{'all-reduce over':<20} {'ranks':<12} GB/s, slowest and fastest group")
    for group, speeds in verdict.bandwidths.items():
        lines.append(f"{group:<20} {len(speeds):<12} {min(speeds) / 1e9:.3g} {max(speeds) / 1e9:.3g}")
    return "\n".join(lines)


def _tera(flops_per_second: float) -> str:
    return f"{flops_per_second / 1e12:.3g}"
