"""The training command, as a user gives it, from start to end."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launchers import pretrain
from megalite.checkpoint.load import find_checkpoint, read_state
from megalite.config.load import load_run
from megalite.measure.timeline import Span, read_timelines
from megalite.pipeline.schedule import orders_of
from tests.launchers.conftest import NUM_STEPS, TIMELINE_AT, ZERO3, Finished
from tests.launchers.jobs import BIN, PRETRAIN, Job, read_rows, wait_for
from tests.ports import reserve_port

SMALL = ["schedule.num_steps=2", "logging.validate_every_steps=0", "logging.tensorboard=false"]


def test_four_ranks_train_to_the_end(uninterrupted: Finished):
    end = uninterrupted.end
    assert (end.returncode, end.errors) == (0, [])
    assert "4 ranks = tensor 2 x pipeline 2 x data 1" in end.stdout
    assert end.stdout.count("trained 8 steps") == 1  # one rank reports
    assert f"step {NUM_STEPS}/{NUM_STEPS} | loss " in end.stderr
    assert "Traceback" not in end.stderr and "Warning" not in end.stderr
    assert "untested" not in end.stdout  # DeepSpeed knows our optimizers


def test_every_step_has_one_row_with_all_of_its_numbers(uninterrupted: Finished):
    rows = read_rows(uninterrupted.folder)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    for row in rows:
        assert {"loss", "grad_norm", "learning_rate", "step_seconds", "tokens_per_second", "mfu"} < row.keys()
        assert all(math.isfinite(value) for value in row.values())
        assert row["consumed_samples"] == 16 * row["step"]
        assert row["consumed_tokens"] == 16 * 128 * row["step"]
        assert row["tokens_per_second"] == pytest.approx(16 * 128 / row["step_seconds"])
    assert [row["step"] for row in rows if "validation_loss" in row] == [4, 8]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


def test_the_folder_says_what_the_run_was(uninterrupted: Finished, tmp_path: Path):
    folder = uninterrupted.folder
    _, _, *overrides = uninterrupted.arguments
    run = load_run(str(folder / "config.yaml"))
    assert run == load_run(None, [*overrides, f"output_dir={folder}"])
    assert run != load_run(None, overrides)
    assert json.loads((folder / "deepspeed.json").read_text()) == json.loads(Path(ZERO3).read_text())
    assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".partial"))]


CLOCKS_SECONDS = 5e-4  # by how much torch's profiler and the runner may differ


def is_within(one: Span, other: Span) -> bool:
    return (
        other.begin_seconds - CLOCKS_SECONDS <= one.begin_seconds
        and one.end_seconds <= other.end_seconds + CLOCKS_SECONDS
    )


def test_a_step_leaves_a_timeline_of_what_every_rank_did(uninterrupted: Finished):
    timelines = read_timelines(uninterrupted.folder)
    assert [t.facts["pipeline"] for t in timelines] == [0, 1, 0, 1]  # rank = pp_rank * 2 + tp_rank
    orders, _ = orders_of("1f1b", 2, 16 // 2)
    for timeline in timelines:
        assert timeline.facts["step"] == TIMELINE_AT
        computed = timeline.lane("compute")
        expected = [
            (type(action).__name__, action.micro_batch) for action in orders[timeline.facts["pp_rank"]]
        ]
        assert [(s.detail["action"], s.detail["micro_batch"]) for s in computed] == expected
        assert len(timeline.lane("transfer")) == 8
        waits, collectives = timeline.lane("collective wait"), timeline.lane("collective")
        assert len(waits) > 8 * 4
        for number, wait in enumerate(waits, start=1):  # of layers, within computations
            assert any(is_within(wait, span) for span in computed)
            assert sum(span.begin_seconds <= wait.end_seconds for span in collectives) >= number
        [update] = timeline.lane("update")
        assert update.begin_seconds >= computed[-1].end_seconds
        assert all(0 <= s.begin_seconds <= s.end_seconds for s in timeline.spans)


def test_tensorboard_shows_the_rows(uninterrupted: Finished):
    events = EventAccumulator(str(uninterrupted.folder / "tensorboard"))
    events.Reload()
    shown = [event.value for event in events.Scalars("loss/train")]
    assert shown == pytest.approx([row["loss"] for row in read_rows(uninterrupted.folder)])


def test_the_newest_two_checkpoints_are_there_and_whole(uninterrupted: Finished):
    root = uninterrupted.folder / "checkpoints"
    assert sorted(path.name for path in root.iterdir()) == ["step-00000007", "step-00000008"]
    newest = find_checkpoint(root)
    assert newest is not None and read_state(newest)["consumed_samples"] == 16 * NUM_STEPS


def test_a_lock_left_by_a_killed_compile_stops_nothing(uninterrupted: Finished, extensions: Path):
    assert uninterrupted.end.returncode == 0
    assert [path.name for path in extensions.rglob("*")] == ["deepspeed_shm_comm", "lock"]


SAYS_WHEN_IT_WAITS = """
from torch.utils.file_baton import FileBaton
wait = FileBaton.wait
def say_and_wait(baton):
    print("waits for", baton.lock_file_path, flush=True)
    wait(baton)
FileBaton.wait = say_and_wait
import deepspeed
deepspeed.init_distributed("gloo", verbose=False)
print("started", flush=True)
"""


def test_without_our_guard_that_lock_would_stop_deepspeed(extensions: Path, tmp_path: Path):
    copy = shutil.copytree(extensions, tmp_path / "extensions")
    lock = copy / "deepspeed_shm_comm/lock"
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    alone |= {"MASTER_PORT": str(reserve_port()), "TORCH_EXTENSIONS_DIR": str(copy)}
    with Job([sys.executable, "-c", SAYS_WHEN_IT_WAITS], tmp_path, DS_ACCELERATOR="cpu", **alone) as job:
        wait_for(lambda: f"waits for {lock}\n" in job.logs[0].read_text(), 120, job)
        assert job.process.poll() is None and "started" not in job.logs[0].read_text()
        lock.unlink()
        job.wait(
            120
        )  # goes on, though without the operator that was never built: the lock is what it waited for


def test_a_bare_command_trains_in_one_process_on_default_data_in_the_default_folder(tmp_path: Path):
    command = [sys.executable, PRETRAIN, "--deepspeed_config", ZERO3, "--config"]
    with Job([*command, *SMALL], tmp_path) as job:
        end = job.wait(240)
    assert (end.returncode, end.errors) == (0, [])
    folder = tmp_path / "runs/default"
    assert [row["step"] for row in read_rows(folder)] == [1, 2]
    data = load_run(str(folder / "config.yaml")).data
    assert data.train == ["runs/default/data/python_stdlib_text_document"] and data.tokenizer == "bytes"


HUGGING_FACE = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": "auto",
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}


def test_torchrun_starts_it_as_well_from_a_json_that_says_auto(
    prefix: str, uninterrupted: Finished, tmp_path: Path
):
    (tmp_path / "auto.json").write_text(json.dumps(HUGGING_FACE))
    torchrun = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--standalone"]
    arguments = ["--deepspeed_config", "auto.json", f"data.train={prefix}"]  # two data-parallel ranks
    with Job([*torchrun, PRETRAIN, *arguments, *SMALL, "output_dir=run"], tmp_path) as job:
        end = job.wait(240)
    assert (end.returncode, end.errors) == (0, [])
    rows, expected = read_rows(tmp_path / "run"), read_rows(uninterrupted.folder)
    assert len(rows) == 2
    assert rows[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)  # every layout is the same run
    assert rows[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-4)
    recorded = json.loads((tmp_path / "run/deepspeed.json").read_text())
    assert recorded["train_batch_size"] == 16 and "auto" not in json.dumps(recorded)


def test_help_shows_how_to_begin(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        pretrain.main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--deepspeed_config", "--config", "parallel.tp_size=2"))
    assert "local_rank" not in shown
