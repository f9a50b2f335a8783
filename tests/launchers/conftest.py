"""One corpus and one uninterrupted run for all tests of the launcher: starting four ranks takes seconds."""

import os
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils.file_baton import FileBaton

from megalite.data.corpus import prepare_default_data
from megalite.tokenizer.load import load_tokenizer
from tests.launchers.jobs import ROOT, Ended, Job, deepspeed

ZERO3 = str(ROOT / "configs/deepspeed/zero3.json")
NUM_STEPS, WARMUP_STEPS, PEAK, VALIDATE_EVERY, TIMELINE_AT = 8, 3, 1e-3, 4, 3


class Finished(NamedTuple):
    """A run that was left alone: its command's arguments but for output_dir, its folder, its end."""

    arguments: list[str]
    folder: Path
    end: Ended


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A part of the default corpus, as bytes."""
    folder = tmp_path_factory.mktemp("data")
    return prepare_default_data(folder, load_tokenizer("bytes"), max_bytes=1 << 20)


@pytest.fixture(scope="session")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TORCH_EXTENSIONS_DIR in which a compile of DeepSpeed's operator was killed: its lock is there."""
    folder = tmp_path_factory.mktemp("extensions")
    build = folder / "deepspeed_shm_comm"  # ShareMemCommBuilder.NAME
    build.mkdir()
    baton = FileBaton(str(build / "lock"))  # as torch.utils.cpp_extension does
    assert baton.try_acquire() and baton.fd is not None
    os.close(baton.fd)  # as a process that is killed does
    return folder


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, prefix: str, extensions: Path) -> Finished:
    """The contract's command: tensor 2 x pipeline 2 under ZeRO-3, in four ranks, over a stale lock."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    arguments = [
        "--deepspeed_config",
        ZERO3,
        "parallel.tp_size=2",
        "parallel.pp_size=2",
        f"data.train={prefix}",
        f"schedule.num_steps={NUM_STEPS}",
        f"schedule.warmup_steps={WARMUP_STEPS}",
        f"optimizer.learning_rate={PEAK}",
        "checkpoint.save_every_steps=1",
        f"logging.validate_every_steps={VALIDATE_EVERY}",
        "logging.validation_steps=1",
        f"logging.timeline_at_step={TIMELINE_AT}",
    ]
    command = deepspeed(4, *arguments, f"output_dir={folder}/run")
    with Job(command, folder, TORCH_EXTENSIONS_DIR=str(extensions)) as job:
        return Finished(arguments, folder / "run", job.wait(240))
