"""A page holds what its runs' folders hold, and nothing from elsewhere; it says what they lack."""

import json
import re
import statistics

import pytest

from megalite.report import bundle, page
from megalite.report.curve import points_of, thinned
from tests.report.folders import HOSTILE, metric, write_bare_run, write_full_run, write_rows
from tests.report.pages import Page
from tools import report_run

LIBRARY = "/* library */"


@pytest.fixture(autouse=True)
def no_library(monkeypatch):
    """The charts' library takes seconds to bundle; the browser's tests have it."""
    monkeypatch.setattr(page, "javascript", lambda: LIBRARY)


def page_of(folders, tmp_path) -> tuple[str, Page]:
    output = tmp_path / "page.html"
    assert report_run.main([*map(str, folders), "--output", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    return text, Page.of(text)


def recorded(folder, name) -> list[tuple[int, float]]:
    """The numbers of metrics.jsonl, read again."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "full"
    return folder, write_full_run(folder)


def test_curves_are_the_numbers_of_the_run(full_run, tmp_path):
    folder, _ = full_run
    _, found = page_of([folder], tmp_path)
    titles = {
        "Loss": "loss",
        "Gradient norm, before clipping": "grad_norm",
        "Learning rate": "learning_rate",
        "Throughput": "tokens_per_second",
        "MFU": "mfu",
        "Largest violation": "expert_largest_violation",
    }
    for title, name in titles.items():
        assert found.points(title) == {"full": recorded(folder, name)}, title
    assert found.points("Loss", "validation") == {"full": recorded(folder, "validation_loss")}
    assert found.points("arc_easy/acc", "task") == {"full": recorded(folder, "evaluation/arc_easy/acc")}


def test_tables_are_the_numbers_of_the_run(full_run, tmp_path):
    folder, rows = full_run
    _, found = page_of([folder], tmp_path)
    numbers = found.cells("Each run in numbers")
    assert numbers["last loss"] == [f"{rows[-1]['loss']:.4f} (step 7)"]
    assert numbers["best validation loss"] == [f"{5 / 6:.4f} (step 6)"]
    assert numbers["steps taken"] == ["7 of 9"] and numbers["tokens consumed"] == ["14,336"]
    assert numbers["layout"] == ["4 ranks = tensor 2 x pipeline 2"]
    speed = found.cells("Speed over all recorded steps")
    seconds = [row["step_seconds"] for row in rows]
    mean = sum(row["tokens_per_second"] * row["step_seconds"] for row in rows) / sum(seconds)
    assert speed["tokens per second"] == [f"{mean:,.0f}"]
    assert speed["median step, seconds"] == [f"{statistics.median(seconds):.4g}"]
    flops = int(speed["FLOPs per token"][0].replace(",", ""))
    assert float(speed["peak of all devices, FLOP/s"][0]) == pytest.approx(4796 * flops / 0.257, rel=1e-3)
    assert found.cells("full: evaluation.json, step 6")["hellaswag"][1:3] == ["acc_norm", "0.4567"]
    assert found.cells("Versions")["torch"] == ["9.8.7"]
    changed = found.cells("What differs from the default run")
    assert changed["optimizer.learning_rate"][1:] == ["0.125"] and "parallel.tp_size" in changed
    assert len(changed) == 1 + 4, "the headings and four settings"
    assert found.cells("full: train data")["ids_sha256"] == ["ab" * 32]


def test_events_are_told_with_their_steps(full_run, tmp_path):
    _, found = page_of([full_run[0]], tmp_path)
    told = [row[:3] for row in found.tables["Events of full"][1:]]
    assert [row[:2] for row in told] == [
        ["0", "start"],
        ["3", "skip"],
        ["3", "fault"],
        ["4", "resume"],
        ["4", "rollback"],
        ["4", "save"],
        ["6", "save"],
    ]
    assert told[2][2] == "grad_norm: not a finite number"
    assert told[5][2] == "training stood still for 0.75 s; no longer there" and "step-00000006" in told[6][2]
    marked = [layer for layer in found.charts["Loss"]["layer"] if layer["mark"]["type"] == "rule"]
    assert [mark["step"] for mark in marked[0]["data"]["values"]] == [3, 4]


def test_waiting_is_counted_from_the_recorded_step(full_run, tmp_path):
    """By hand: of 0.4 s. The plan, by means of 0.075, 0.1 and 0.075 s, takes 0.425 s, of that 0.25 each."""
    _, found = page_of([full_run[0]], tmp_path)
    waits = found.cells("Waiting of each rank of full of step 5")
    assert waits["rank 0"] == ["0.3000", "0.1000", "25.0%", "41.2%"]
    assert waits["rank 1"] == ["0.2000", "0.2000", "50.0%", "41.2%"]
    rows = {bar["row"] for bar in found.charts["Recorded: full of step 5"]["data"]["values"]}
    assert rows == {"rank 0", "rank 0 transfer", "rank 1", "rank 1 transfer"}


def test_the_planned_timeline_is_that_of_the_schedule(full_run, tmp_path):
    """1F1B of 8 micro batches in 2 stages waits (p - 1) / (m + p - 1) of the time."""
    _, found = page_of([full_run[0]], tmp_path)
    title = "Planned: full, 1f1b, 8 micro batches; ranks wait 11.1% of the time"
    assert len(found.charts[title]["data"]["values"]) == 2 * 2 * 8


def test_bytes_are_shown_by_name(full_run, tmp_path):
    _, found = page_of([full_run[0]], tmp_path)
    table = found.cells("Memory of full")
    assert table[""][:2] == ["rank 6 planned", "rank 6 measured"] and len(table[""]) == 2 * 4
    assert table["activations"][:2] == ["500 kB", "-"] and table["not told apart"][:2] == ["-", "900 kB"]
    assert table["in all, at the peak"][:2] == ["3.5 MB", "4 MB"]
    assert table["beside it, before the model was made"][1] == "9 MB"
    bars = found.charts["Memory of full at the peak, by name"]["data"]["values"]
    assert max(bar["end"] for bar in bars) == 4_000_009
    assert any("of 10 ranks the 4 that took most" in note for note in found.notes)


def test_experts_are_drawn_with_their_load(full_run, tmp_path):
    _, found = page_of([full_run[0]], tmp_path)
    cells = found.charts["Load of the experts of layer 0, full"]["data"]["values"]
    assert [cell["load"] for cell in cells if cell["begin"] == 0.5] == [0.4, 0.8, 1.2, 1.6]
    assert "Load of the experts of layer 2, full" in found.charts


def test_two_runs_stand_side_by_side(full_run, tmp_path):
    other = tmp_path / "other" / "full"
    write_bare_run(other, 12)
    _, found = page_of([full_run[0], other], tmp_path)
    names = [f"{folder.parent.name}/full" for folder in (full_run[0], other)]
    assert found.points("Loss") == {
        name: recorded(folder, "loss") for name, folder in zip(names, (full_run[0], other), strict=True)
    }
    assert found.tables["Each run in numbers"][0] == ["", *names]
    assert found.cells("Each run in numbers")["steps taken"] == ["7 of 9", "12"]


def test_what_a_folder_lacks_is_said(tmp_path):
    write_bare_run(tmp_path / "bare", 3)
    _, found = page_of([tmp_path / "bare"], tmp_path)
    for words in (
        "config.yaml is not in the folder",
        "deepspeed.json is not in the folder",
        "no validation was recorded",
        "no memory.json",
        "its pipeline is not known",
        "no timeline was recorded",
        "no TensorBoard files",
        "nothing was evaluated",
        "no checkpoint says what data",
        "its configuration is not known",
    ):
        assert sum(words in note for note in found.notes) == 1, words
    assert "No run has experts: bare." in found.notes


def test_damaged_extras_are_said_and_the_page_is_written(tmp_path):
    folder = tmp_path / "run"
    write_bare_run(folder, 2)
    texts = {
        "config.yaml": "model: 3\n",
        "memory.json": "[1]",
        "timeline-rank0.json": "{}",
        "evaluation.json": "{}",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    _, found = page_of([folder], tmp_path)
    for words in ("model", "memory.json is not", "timeline-rank0.json is no timeline", "is not a record of"):
        assert any(note.startswith("run: ") and words in note for note in found.notes), words


def test_the_page_is_whole_and_loads_nothing(full_run, tmp_path):
    text, found = page_of([full_run[0]], tmp_path)
    assert found.mistakes == [] and found.loaded == []
    assert not re.search(r"url\(|@import", text)
    assert len(found.charts) == len(found.descriptions) - len(page.SECTIONS[:1]), (
        "each chart is told in words"
    )
    assert all(found.tables), "each table has a caption"


def test_texts_of_a_run_are_never_markup(tmp_path):
    folder = tmp_path / HOSTILE.replace("/", "")
    write_full_run(folder)
    text, found = page_of([folder], tmp_path)
    assert found.mistakes == [] and LIBRARY in found.scripts[-2].strip()
    assert "<script>alert" not in text and not any(script.startswith("alert") for script in found.scripts)
    assert list(found.points("Loss")) == [folder.name]
    assert found.cells(f"{folder.name}: train data")["prefix"] == [HOSTILE]


def test_a_last_line_in_the_making_is_left_out(tmp_path):
    rows = write_bare_run(tmp_path / "run", 3)
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    _, found = page_of([tmp_path / "run"], tmp_path)
    assert found.points("Loss")["run"] == [(row["step"], row["loss"]) for row in rows]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "metrics.jsonl: No such file: give the folder that a run wrote"),
        ("", "metrics.jsonl is empty: the run has not taken a step yet"),
        ("not json\n", "metrics.jsonl, line 1: not a row of metrics"),
        ('{"step": 1, "loss": "low"}\n', "step 1: loss is not a number: remove the row"),
    ],
)
def test_a_folder_without_rows_is_one_line(tmp_path, capsys, content, message):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run/metrics.jsonl").write_text(content)
    assert report_run.main([str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run/report.html").exists()


def test_a_run_that_is_named_twice_is_one_line(tmp_path, capsys):
    write_bare_run(tmp_path / "run", 1)
    assert report_run.main([str(tmp_path / "run"), f"{tmp_path}/./run"]) == 2
    assert "is given twice" in capsys.readouterr().err


def test_a_missing_library_is_one_line(tmp_path, capsys, monkeypatch):
    write_bare_run(tmp_path / "run", 1)
    monkeypatch.setattr(page, "javascript", bundle.javascript)
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    assert report_run.main([str(tmp_path / "run")]) == 2
    assert "pip install 'megalite[report]'" in capsys.readouterr().err


def test_a_long_run_is_thinned_to_means_within_their_band(tmp_path):
    rows = [metric(step, loss=float(step % 7)) for step in range(1, 1501)]
    write_rows(tmp_path / "run", rows)
    _, found = page_of([tmp_path / "run"], tmp_path)
    values = found.charts["Loss"]["data"]["values"]
    assert len(values) == 500 and [value["step"] for value in values] == list(range(3, 1501, 3))
    for number, value in enumerate(values):
        three = [row["loss"] for row in rows[3 * number : 3 * number + 3]]
        assert (value["least"], value["largest"]) == (min(three), max(three))
        assert value["value"] == pytest.approx(sum(three) / 3)
    assert any("more than 600 steps" in note for note in found.notes)


def test_points_skip_steps_without_a_number():
    rows = [{"step": 1, "x": 2.0}, {"step": 2, "x": None}, {"step": 3}, {"step": 4, "x": 3.0}]
    assert [point[:2] for point in points_of(rows, "x")] == [(1, 2.0), (4, 3.0)]
    assert [len(thinned([(step, 0.0) for step in range(count)], 10)) for count in (0, 10, 11, 100)] == [
        0,
        10,
        6,
        10,
    ]
