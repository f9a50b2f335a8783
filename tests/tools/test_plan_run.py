"""Plans on the command line: without torch, in tables and JSON, searched, and compared with a run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.config.device import load_device
from megalite.config.load import dump_run, load_run
from megalite.measure.efficiency import METRICS_FILE
from tools import describe_scaling, plan_run

ROOT = Path(__file__).parents[2]
ZERO1 = ROOT / "configs" / "deepspeed" / "pretrain_460m.json"
RUN = ROOT / "configs" / "runs" / "pretrain_460m.yaml"
SMALL = ["--deepspeed_config", str(ZERO1), "--config", str(RUN), "model.num_hidden_layers=4"]


def test_it_needs_no_torch():
    """A process in which torch, DeepSpeed and numpy cannot be imported plans and searches."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'deepspeed', 'numpy')))"
    words = [*SMALL, "--nodes", "1", "--gpus-per-node", "2"]
    calls = f"main({words!r}) or main({[*words, '--search']!r})"
    command = [sys.executable, "-c", f"{blocked}; from tools.plan_run import main; sys.exit({calls})"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "MFU" in done.stdout and "layouts looked at" in done.stdout


def test_json_and_the_page_tell_the_same_step(capsys):
    assert plan_run.main([*SMALL, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert plan_run.main(SMALL) == 0
    assert f"MFU {values['mfu']:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([*SMALL, "parallel.tp_size=3"], "error: 8 processes cannot be divided into tp_size 3"),
        ([*SMALL, "--nodes", "0"], "error: --nodes is 0: give at least 1"),
        ([*SMALL, "--device", "z80"], "error: device z80 is not to be read"),
        ([*SMALL, "--output", "x"], "error: --output takes the configs that --search finds"),
        ([*SMALL, "--write-device", "x"], "error: --write-device takes what --measure finds"),
        (["--config", str(RUN)], "error: no --deepspeed_config"),
        (["--measure", "nowhere"], "error: "),
    ],
)
def test_a_mistake_is_one_line(capsys, words, line):
    assert plan_run.main(words) == 2
    told = capsys.readouterr()
    assert told.err.startswith(line) and told.err.count("\n") == 1 and not told.out


@pytest.fixture
def run_dir(tmp_path):
    """A run of 460M's width on two GPUs whose steps took 0.5 s, after two that warmed up."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_run(load_run(str(RUN), [])), encoding="utf-8")
    (folder / "deepspeed.json").write_text(ZERO1.read_text(encoding="utf-8"), encoding="utf-8")
    seconds = [9.0, 7.0, 0.5, 0.49, 0.51]
    rows = [json.dumps({"step": step, "step_seconds": took}) + "\n" for step, took in enumerate(seconds, 1)]
    (folder / METRICS_FILE).write_text("".join(rows), encoding="utf-8")
    return folder


def test_a_measured_run_gives_the_efficiency_with_which_its_plan_is_right(run_dir, tmp_path, capsys):
    device = tmp_path / "ours.yaml"
    words = ["--measure", str(run_dir), "--json"]
    assert plan_run.main([*words, "--write-device", str(device)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["measured_step_seconds"], found["num_steps"]) == (0.5, 3)
    assert found["error"] == pytest.approx(found["planned_step_seconds"] / 0.5 - 1)
    assert load_device(device).matmul_efficiency == found["matmul_efficiency"] < 0.7
    assert plan_run.main([*words, "--device", str(device)]) == 0
    assert abs(json.loads(capsys.readouterr().out)["error"]) < 1e-3


def test_a_recorded_timeline_tells_how_long_ranks_waited(run_dir, capsys):
    spans = [("compute", 0, 60), ("wait", 60, 30), ("compute", 90, 10)]
    events = [{"ph": "X", "cat": lane, "name": lane, "ts": ts, "dur": dur} for lane, ts, dur in spans]
    trace = {"traceEvents": [{"ph": "M", "name": "process_name"}, *events]}
    (run_dir / "timeline-rank0.json").write_text(json.dumps(trace), encoding="utf-8")
    assert plan_run.main(["--measure", str(run_dir)]) == 0
    assert "waiting   30.0% of the recorded step, planned 0.0%" in capsys.readouterr().out


def test_steps_that_no_efficiency_explains_are_refused(run_dir, capsys):
    (run_dir / METRICS_FILE).write_text('{"step": 1, "step_seconds": 0.001}\n' * 4, encoding="utf-8")
    assert plan_run.main(["--measure", str(run_dir)]) == 2
    assert "no efficiency explains it" in capsys.readouterr().err
    (run_dir / METRICS_FILE).write_text('{"step": 1, "step_seconds": 0.5}\n' * 2, encoding="utf-8")
    assert plan_run.main(["--measure", str(run_dir)]) == 2
    assert "has 2 steps and 2 of them warm up" in capsys.readouterr().err


def test_a_run_whose_stages_cannot_be_is_not_compared(run_dir, capsys):
    assert plan_run.main(["--measure", str(run_dir), "parallel.layers_per_stage=[3]"]) == 2
    assert "parallel.layers_per_stage adds up to 3" in capsys.readouterr().err


def test_the_tables_of_the_page_are_what_the_code_says():
    page = describe_scaling.PAGE.read_text(encoding="utf-8")
    assert page == describe_scaling.described(page), "run: python tools/describe_scaling.py"
    assert set(describe_scaling.BLOCKS) == {name for _, name, _ in describe_scaling.BLOCK.findall(page)}


@pytest.mark.parametrize(
    "row", [*describe_scaling.ROWS, describe_scaling.LARGEST], ids=lambda row: f"{row.title}-{row.nodes}"
)
def test_what_the_page_plans_fits(row):
    assert describe_scaling.plan_of(row).fits
