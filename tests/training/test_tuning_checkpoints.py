"""Runs of fine-tuning, of DPO and of DPO on adapters go on after a stop, as if there had been none.

Each is a job from its configuration on, in a world of two ranks that is started once: data, references, loop
and checkpoints. What was stopped is a copy of the run's folder that ends with the checkpoint in the middle,
without prepared data and references, so that these are made again before the weights are read. In its own
layout it goes on bit for bit; in another one the state is exact, and then its arithmetic is another layout's.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalite.config.checkpoint import CheckpointConfig
from megalite.config.data import DataConfig
from megalite.config.logging import LoggingConfig
from megalite.config.run import RunConfig
from megalite.config.schedule import ScheduleConfig
from megalite.config.tuning import LoraConfig, PreferenceConfig
from megalite.training.engine import initialize_communication
from tests.checkpoint.llamas import save_llama
from tests.conversations import (
    SEQ_LENGTH,
    conversations,
    model_of,
    tokens_of,
    write_conversations,
    write_rows,
)
from tests.harness import run_distributed
from tests.jobs_in_world import run_job
from tests.reference import transformers_model
from tests.trainers import ADAM, SEED, Case, deepspeed_config, run_config

STOP, LAST = 2, 4
MODEL = model_of().model_copy(update={"num_hidden_layers": 2})
LAYOUTS = [Case(tp=2, zero=1), Case(pp=2, zero=3), Case(dp=2, zero=2), Case(dp=2, zero=3)]
NAMES = ["whole", "again", "moved"]
KINDS = ["finetune", "prefer", "adapters"]
MEASURED = ("seconds", "per_second", "mfu")  # ends of names


@dataclass(frozen=True)
class Place:
    """What is trained, where it was stopped, and where a run of it is."""

    kind: str
    layout: int
    name: str = "whole"  # or "again" in its own layout, or "moved" to the next one

    @property
    def case(self) -> Case:
        return LAYOUTS[(self.layout + (self.name == "moved")) % len(LAYOUTS)]

    def folder(self, root: Path) -> Path:
        return root / f"{self.kind}-{self.layout}-{self.name}"


def run_of(place: Place, root: Path) -> RunConfig:
    train = ["pairs.jsonl"] if place.kind != "finetune" else ["one.jsonl", "two.jsonl"]
    folder = place.folder(root)
    return run_config(
        place.case,
        task="finetune" if place.kind == "finetune" else "prefer",
        model=MODEL,
        data=DataConfig(
            train=[str(root / name) for name in train],
            tokenizer=str(root / "tokenizer"),
            cache_dir=str(folder / "cache"),
            seq_length=SEQ_LENGTH,
        ),
        schedule=ScheduleConfig(num_steps=LAST, warmup_steps=1),
        checkpoint=CheckpointConfig(start_from=str(root / "start"), save_every_steps=STOP),
        logging=LoggingConfig(tensorboard=False, progress_bar=False, peak_tflops_per_device=1.0),
        preference=PreferenceConfig(beta=0.3),
        lora=LoraConfig(rank=2 if place.kind == "adapters" else 0),
        optimizer=ADAM.model_copy(update={"learning_rate": 1e-2}),
        output_dir=str(folder),
    )


def live(rank: int, root: Path) -> None:
    """Every run, whole, then stopped and continued in its own layout, and in the next."""
    initialize_communication()
    for kind in KINDS:
        for layout in range(len(LAYOUTS)):
            for name in NAMES[: 2 if kind == "adapters" else 3]:
                place = Place(kind, layout, name)
                if rank == 0 and name != "whole":
                    stop(Place(kind, layout).folder(root), place.folder(root))
                dist.barrier()
                run_job(rank, run_of(place, root), deepspeed_config(place.case))


def stop(whole: Path, stopped: Path) -> None:
    """What a run leaves that ends after its step STOP, and no record and no prepared data."""
    without = shutil.ignore_patterns(checkpoint(whole, LAST).name, "metrics.jsonl", "cache")
    shutil.copytree(whole, stopped, ignore=without)


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08}"


def pairs() -> list[dict[str, Any]]:
    """Answers, and those of the conversation after."""
    talks = [talk for talk in conversations() if talk[-1]["role"] == "assistant"]
    rows = [
        {"prompt": talk[:-1], "chosen": talk[-1:], "rejected": other[-1:]} for talk, other in pairwise(talks)
    ]
    return [row for row in rows if len(tokens_of(row["prompt"] + row["rejected"]).ids) <= SEQ_LENGTH]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, in folders of one."""
    root = tmp_path_factory.mktemp("runs")
    write_conversations(root)
    write_rows(root / "pairs.jsonl", pairs())
    llama = transformers_model(MODEL, SEED)
    data = DataConfig(train=["one.jsonl"], tokenizer=str(root / "tokenizer"))
    save_llama(root / "start" / "checkpoints", llama, RunConfig(model=MODEL, data=data))
    run_distributed(live, 2, root, timeout_seconds=500)
    return root


def rows_of(place: Place, root: Path) -> list[dict[str, float]]:
    """The record but for times."""
    lines = (place.folder(root) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(MEASURED)} for line in lines]


def state_hashes(place: Place, root: Path) -> dict[str, str]:
    """Of each file with tensors in the last checkpoint."""
    files = sorted(checkpoint(place.folder(root), LAST).glob("*.safetensors"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.timeout(600)  # the first one waits for all runs
@pytest.mark.parametrize("layout", range(len(LAYOUTS)), ids=lambda i: str(LAYOUTS[i]))
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(kind, layout, root):
    whole, again = Place(kind, layout), Place(kind, layout, "again")
    rows = rows_of(whole, root)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows_of(again, root) == rows[STOP:]
    assert state_hashes(again, root) == state_hashes(whole, root) != {}


@pytest.mark.parametrize("layout", range(len(LAYOUTS)), ids=lambda i: f"{LAYOUTS[i]} and on")
@pytest.mark.parametrize("kind", ["finetune", "prefer"])  # adapters: see test_adapter_checkpoints.py
def test_another_layout_goes_on_with_it(kind, layout, root):
    """As near as the last step of tests/test_equivalence.py; absolute for rewards, which are differences."""
    rows, moved = rows_of(Place(kind, layout), root)[STOP:], rows_of(Place(kind, layout, "moved"), root)
    assert [row.keys() for row in moved] == [row.keys() for row in rows]
    got, want = (torch.tensor([list(row.values()) for row in side]) for side in (moved, rows))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_another_one_and_references_are_those_of_the_start(kind, root):
    """Else data of another step, or references after an update, would go unnoticed."""
    rows = rows_of(Place(kind, 0), root)
    assert len({row["loss"] for row in rows}) == LAST
    if kind != "finetune":
        assert abs(rows[0]["rewards/margins"]) < 1e-5 < 1e-2 < abs(rows[STOP]["rewards/margins"])
        files = [
            next((Place(kind, 0, name).folder(root) / "cache").glob("references-*")) for name in NAMES[:2]
        ]
        assert files[0].read_bytes() == files[1].read_bytes()
