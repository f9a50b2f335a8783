"""Plans on paper beside what runs take on this machine: the peak memory of the fullest rank and the time of a
step, for five shapes in six to eleven layouts of two and four processes, 8 samples per step in fp32. The
device is calibrated on shapes of its own: four on one process, and one of them on two with tensor
parallelism and with ZeRO-3; nothing that is judged is among them.
A cluster is a shape on two or on four processes: last is told how much slower the layout that the plan puts
first is than the best of those measured. Ranks share the cores, as plans know.

The scatter plot, and what was taken over what was planned as a table, are in scaling.md. Where other work
takes the cores away, CLOCK = "cpu" judges a step by the processors' time of all ranks over the cores.
"""

import gc
import os
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.measurement import Measurement
from benchmarks.samples import random_samples
from benchmarks.world import in_world
from megalite.config.deepspeed import deepspeed_config_from
from megalite.config.device import DeviceConfig
from megalite.config.load import load_run
from megalite.plan.job import Job
from megalite.plan.plan import memory_of_stages
from megalite.plan.step_time import step_time

TITLE = "Plans: what they say beside what is so"
PEER = "plan"
CLOCK = "wall"
SAMPLES, STEPS, WARM_UP = 8, 5, 3
CORES = os.cpu_count() or 1
DOCS = Path(__file__).parent.parent / "docs"
PLOT, PAGE = DOCS / "images" / "plan_benchmark_scatter.png", DOCS / "scaling.md"
BEGIN, END = "<!-- measured: plans -->\n", "<!-- end -->"
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}  # freed memory goes back at once

SHAPES = {  # hidden, MLP, layers, heads, vocabulary, tokens of a sample
    "wide": (512, 1408, 4, 8, 4096, 256),
    "deep": (256, 704, 12, 4, 4096, 128),
    "long": (256, 704, 4, 4, 4096, 1024),
    "words": (256, 704, 4, 4, 32768, 256),
    "experts": (256, 704, 4, 4, 4096, 256),
}
CALIBRATION = {
    "broad": (768, 2048, 2, 8, 2048, 128),
    "slim": (128, 352, 16, 4, 2048, 128),
    "middle": (384, 1024, 6, 8, 2048, 256),
    "tables": (192, 512, 2, 4, 16384, 128),
}
TINY = (32, 64, 4, 4, 128, 64)
EXPERTS = "model.n_routed_experts=8 model.num_experts_per_tok=2 model.moe_intermediate_size=352"


class Row(NamedTuple):
    """A shape in a layout."""

    shape: str
    world_size: int = 1
    zero: int = 1
    micro_batch: int = 4
    parallel: str = ""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.shape}, {self.layout()}"

    def layout(self) -> str:
        """All but the shape, for people."""
        words = (
            self.parallel.replace("parallel.", "").replace("pipeline_schedule=", "").replace("_size=", " ")
        )
        return f"{self.world_size} ranks, ZeRO-{self.zero}, micro batch {self.micro_batch} {words}".strip()


TP2, PP2, CP2 = "parallel.tp_size=2", "parallel.pp_size=2", "parallel.cp_size=2"
LAYOUTS = [
    (2, 1, 4, ""),
    (2, 3, 4, ""),
    (2, 3, 2, "parallel.recompute=full"),
    (2, 1, 4, TP2),
    (2, 1, 4, CP2),
    (2, 1, 2, PP2),
    (4, 1, 2, ""),
    (4, 3, 2, TP2),
    (4, 3, 2, f"{TP2} {PP2}"),
    (4, 1, 2, f"{PP2} parallel.pipeline_schedule=interleaved"),
    (4, 2, 2, f"{PP2} parallel.pipeline_schedule=zb-h1"),
]
FEW = [LAYOUTS[i] for i in (0, 1, 3, 6, 7, 9)]
LAYOUTS_OF = {"wide": LAYOUTS, "deep": LAYOUTS, "long": [*FEW, LAYOUTS[2], LAYOUTS[4]]}
ROWS = [Row(shape, *layout) for shape in SHAPES for layout in LAYOUTS_OF.get(shape, FEW)]


@dataclass(frozen=True)
class Taken:
    """What a row took: seconds of a step on the wall, and of all processors; bytes of the fullest rank."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: float

    @property
    def seconds(self) -> float:
        """Of a step, by the clock."""
        return self.wall_seconds if CLOCK == "wall" else self.cpu_seconds / CORES


Plans = Mapping[Row, tuple[float, float]]  # seconds of a step, bytes of the fullest rank


def measure() -> list[Measurement]:
    """All rows."""
    return compare(ROWS)


def compare(rows: Sequence[Row]) -> list[Measurement]:
    """Rows beside their plans, the clusters, and the scatter plot."""
    device = calibrated()
    planned = {row: planned_row(row, device) for row in rows}
    taken = {}
    for row in rows:
        taken[row] = taken_by(row)
        _tell(row, taken[row], planned[row])
    draw(planned, taken)
    write_ratios(planned, taken)
    return results_of(planned, taken)


def results_of(planned: Plans, taken: Mapping[Row, Taken]) -> list[Measurement]:
    """Both figures of each row, and of each cluster how the plan chose."""
    results, rows = [], list(taken)
    for row in rows:
        seconds, size_bytes = planned[row]
        results.append(_less(f"{row.name}: step", "s", taken[row].seconds, seconds))
        mib = taken[row].peak_bytes / 2**20, size_bytes / 2**20
        results.append(_less(f"{row.name}: memory", "MiB", *mib))
    for cluster in sorted({(row.shape, row.world_size) for row in rows}):
        of_cluster = [row for row in rows if (row.shape, row.world_size) == cluster]
        best = min(taken[row].seconds for row in of_cluster)
        chosen = taken[min(of_cluster, key=lambda row: planned[row][0])].seconds
        name = f"cluster of {cluster[1]}, {cluster[0]}: the layout that is planned best"
        results.append(_less(name, "s", chosen, best))
    return results


def write_ratios(planned: Plans, taken: Mapping[Row, Taken]) -> None:
    """Taken over planned, time of a step and memory, by layout and shape, between the page's marks."""
    shapes, layouts = ({get(row): None for row in taken} for get in (lambda row: row.shape, Row.layout))
    lines = [f"| | {' | '.join(shapes)} |", "|---" + "|---:" * len(shapes) + "|"]
    for layout in layouts:
        found = {row.shape: row for row in taken if Row.layout(row) == layout}
        cells = [_ratios(found.get(shape), planned, taken) for shape in shapes]
        lines.append(f"| {layout} | {' | '.join(cells)} |")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + "\n".join(lines) + "\n" + END + after, encoding="utf-8")


def _ratios(row: Row | None, planned: Plans, taken: Mapping[Row, Taken]) -> str:
    if row is None:
        return ""
    return f"{taken[row].seconds / planned[row][0]:.2f}, {taken[row].peak_bytes / planned[row][1]:.2f}"


def _tell(row: Row, taken: Taken, planned: tuple[float, float]) -> None:
    """Show progress: both figures of a row, and what their ratio to the plan is."""
    seconds, size_bytes = planned
    print(
        f"{row.name}: {taken.wall_seconds:.3f} s wall, {taken.cpu_seconds:.3f} s of processors, planned "
        f"{seconds:.3f} ({taken.seconds / seconds:.2f}); {taken.peak_bytes / 2**20:.0f} MiB, planned "
        f"{size_bytes / 2**20:.0f} ({taken.peak_bytes / size_bytes:.2f})",
        file=sys.stderr,
        flush=True,
    )


def _less(name: str, unit: str, taken: float, peer: float) -> Measurement:
    return Measurement(name, unit, taken, peer, higher_is_better=False)


def job_of(row: Row, device: DeviceConfig) -> Job:
    """A row on this machine as one node."""
    shapes = SHAPES | CALIBRATION | {"tiny": TINY}
    hidden, inner, layers, heads, vocabulary, seq_length = shapes[row.shape]
    model = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": seq_length,
    }
    words = [f"model.{key}={value}" for key, value in model.items()]
    words += [f"data.seq_length={seq_length}", *row.parallel.split()]
    words += EXPERTS.split() if row.shape == "experts" else []
    raw = {
        "train_batch_size": SAMPLES,
        "train_micro_batch_size_per_gpu": row.micro_batch,
        "zero_optimization": {"stage": row.zero},
    }
    return Job(load_run(None, words), deepspeed_config_from(raw, "the benchmark"), device, 1, row.world_size)


def planned_row(row: Row, device: DeviceConfig) -> tuple[float, float]:
    """Seconds of a step, and bytes of the fullest rank."""
    job = job_of(row, device)
    return step_time(job).total, max(sum(of_rank.values()) for of_rank in memory_of_stages(job))


def taken_by(row: Row) -> Taken:
    """By the clocks of one world, and by the memory of another in which freed blocks go back."""
    before = {name: os.environ.get(name) for name in MAPPED}
    os.environ.update(MAPPED)
    try:
        measured = in_world(row.world_size, steps_of, row)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return Taken(*times_of(row), max(rank["peak"] for rank in measured))


def times_of(row: Row) -> tuple[float, float]:
    """Seconds of a step: on the wall, and of the processors of all ranks."""
    timed = in_world(row.world_size, steps_of, row)
    wall = statistics.median(max(walls) for walls in zip(*(rank["wall"] for rank in timed), strict=True))
    cpu = statistics.median(sum(of) for of in zip(*(rank["cpu"] for rank in timed), strict=True))
    return wall, cpu


def steps_of(row: Row) -> dict[str, Any]:
    """On a rank: wall and processor seconds of each step, and the bytes that it grew by at its peak.

    A tiny model of the same layout goes first: what libraries take at their first use is not the run's.
    """
    _train(row._replace(shape="tiny"), 2)
    gc.collect()
    before = _resident_bytes()
    wall, cpu = _train(row, WARM_UP + STEPS)
    return {"wall": wall[WARM_UP:], "cpu": cpu[WARM_UP:], "peak": _resident_bytes("VmHWM") - before}


def _train(row: Row, num_steps: int) -> tuple[list[float], list[float]]:
    from megalite.training.trainer import StageTrainer, build_context

    job = job_of(row, IDLE)
    context = build_context(job.run, dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    trainer = StageTrainer(job.run, job.deepspeed, context)
    sizes = SAMPLES, job.run.model.vocab_size, job.run.data.seq_length
    samples = random_samples(*sizes, torch.device("cpu")).split(job.dp_size)[context["dp"].rank]
    batches = samples.split(job.num_micro_batches)
    wall, cpu = [], []
    for step in range(num_steps):
        if step == WARM_UP:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts from here
        dist.barrier()
        started, used = time.perf_counter(), _cpu_seconds()
        trainer.train_step(batches, 1e-4)
        wall.append(time.perf_counter() - started)
        cpu.append(_cpu_seconds() - used)
    return wall, cpu


IDLE = DeviceConfig(  # an order of magnitude, for jobs that nobody times
    name="this machine",
    peak_tflops=0.1,
    peak_tflops_fp32=0.1,
    memory_gib=16.0,
    memory_gb_per_second=10.0,
    link_gb_per_second=1.0,
    network_gb_per_second=1.0,
    matmul_efficiency=0.8,
    communication_efficiency=1.0,
    link_latency_seconds=2e-4,
    overlap=0.0,
    processors_per_node=CORES,
)


def calibrated() -> DeviceConfig:
    """This machine: its products, its gloo, and what shapes of their own take, alone and on two ranks."""
    rows = [Row(shape, micro_batch=micro) for shape in CALIBRATION for micro in (2, 4)]
    alone = {row: times_of(row)[1] for row in rows}
    pairs = [Row("slim", 2, 1, 2, TP2), Row("slim", 2, 1, 4, TP2), Row("slim", 2, 3, 2), Row("slim", 2, 3, 4)]
    together = {row: times_of(row)[0] for row in pairs}
    for row, seconds in (alone | together).items():
        print(f"calibration {row.name}: {seconds:.3f} s", file=sys.stderr, flush=True)
    bandwidth, latency = in_world(2, gloo_speed)[0]
    start = IDLE.model_copy(update={"link_gb_per_second": bandwidth / 1e9, "link_latency_seconds": latency})
    device = calibrate(start, alone, together)
    print(f"calibrated: {device}", file=sys.stderr, flush=True)
    return device


def calibrate(start: DeviceConfig, alone: dict[Row, float], together: dict[Row, float]) -> DeviceConfig:
    """By seconds of processors of one process, then by seconds of two ranks, which wait for each other."""
    begin = {"layer_seconds": 1e-4, "zero3_layer_seconds": 1e-3, "step_seconds": 1e-3}
    names = ("peak_tflops_fp32", "elementwise_bytes", "optimizer_bytes", "layer_seconds", "step_seconds")
    device = fit(start.model_copy(update=begin), alone, names)
    return fit(device, together, ("link_latency_seconds", "zero3_layer_seconds"))


def fit(device: DeviceConfig, taken: dict[Row, float], names: Sequence[str]) -> DeviceConfig:
    """The device whose unknowns make the least relative squared error: coordinate by coordinate."""
    width = 4.0
    while width > 1.005:
        for name in names:
            value = getattr(device, name)
            tried = [device.model_copy(update={name: value * f}) for f in (1 / width, 1.0, width)]
            device = min(tried, key=lambda d: _error(d, taken))
        width = width**0.85
    return device


def _error(device: DeviceConfig, taken: dict[Row, float]) -> float:
    return sum((step_time(job_of(row, device)).total / seconds - 1) ** 2 for row, seconds in taken.items())


def gloo_speed() -> tuple[float, float]:
    """Bytes per second and seconds per call of an all-gather between two ranks, in processor time of one."""
    seconds = {}
    for numel in (256, 4_000_000):
        part, whole = torch.zeros(numel), torch.zeros(2 * numel)
        spent = []
        for _ in range(9):
            dist.barrier()
            started = _cpu_seconds()
            dist.all_gather_into_tensor(whole, part)
            spent.append(_cpu_seconds() - started)
        seconds[numel] = statistics.median(spent)
    latency = max(seconds[256], 1e-6)
    return 4 * 4_000_000 / max(seconds[4_000_000] - latency, 1e-9), latency


def draw(planned: Plans, taken: Mapping[Row, Taken]) -> None:
    """Planned over measured, step times and memory, with the bands that are promised."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    from megalite.measure.figure import save_figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    seconds, memory = figure.subplots(1, 2)
    panels = [
        (seconds, [(taken[row].seconds, planned[row][0]) for row in planned], "step, in seconds", 0.2),
        (
            memory,
            [(taken[row].peak_bytes / 2**20, planned[row][1] / 2**20) for row in planned],
            "memory, in MiB",
            0.1,
        ),
    ]
    for axes, points, what, band in panels:
        ends = min(map(min, points)) * 0.8, max(map(max, points)) * 1.25
        axes.plot(ends, ends, color="black", lw=0.8)
        least, most = ([end * factor for end in ends] for factor in (1 - band, 1 + band))
        axes.fill_between(ends, least, most, alpha=0.15)
        axes.scatter(*zip(*points, strict=True), s=14, color="#2563a8")
        axes.set(xscale="log", yscale="log", xlabel=f"measured {what}", ylabel="planned")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FormatStrFormatter("%g"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_title(f"within {band:.0%}")
    save_figure(figure, PLOT, dots_per_inch=110)


def _cpu_seconds() -> float:
    """Of this process, all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _resident_bytes(field: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
