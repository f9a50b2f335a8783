import json
from types import SimpleNamespace

import pytest

from benchmarks import run
from benchmarks.measurement import Measurement

MEASUREMENTS = [
    Measurement("speed", "1/s", 3000, 1500),
    Measurement("time", "s", 0.5, 0.25, higher_is_better=False),
    Measurement("alone", "MiB", 12),
    Measurement("rounds", "s", 1.0, 2.0, higher_is_better=False, spread=(1.9, 2.2)),
    Measurement("share", "%", 30.0, spread=(29.5, 31.0)),
]


def module(title, opening="What is measured."):
    return SimpleNamespace(
        TITLE=title, PEER="peer", __doc__=f"{opening}\n\nMore.", measure=lambda: MEASUREMENTS
    )


def test_the_table_says_how_many_times_better():
    lines = run.table(MEASUREMENTS, "peer").splitlines()
    assert lines[2:] == [
        "| speed | 3,000 | 1,500 | 1/s | 2.00 |",
        "| time | 0.5 | 0.25 | s | 0.50 |",
        "| alone | 12 | - | MiB | - |",
        "| rounds | 1 | 2 | s | 2.00 (1.90 to 2.20) |",
        "| share | 30 (29.5 to 31) | - | % | - |",
    ]


def test_a_section_takes_the_place_of_its_former_self_only(tmp_path):
    page = tmp_path / "docs" / "benchmarks.md"
    run.publish(page, "b", module("Beta"), MEASUREMENTS)
    run.publish(page, "a", module("Alpha", "Old."), MEASUREMENTS)
    before = page.read_text()
    run.publish(page, "a", module("Alpha", "New."), MEASUREMENTS)
    assert page.read_text() == before.replace("Old.", "New.") != before
    assert before.index("## Alpha") < before.index("## Beta") and before.startswith(run.INTRODUCTION)
    assert {path.name for path in (page.parent / "images").iterdir()} == {
        "a_benchmark.png",
        "b_benchmark.png",
    }


def test_an_unknown_benchmark_is_one_line(capsys):
    assert run.main(["nothing"]) == 2
    assert (
        "error: no benchmark 'nothing': known are context, conversion, data_index" in capsys.readouterr().err
    )


@pytest.mark.parametrize("missing", ["megatron", "datasets"])
def test_a_benchmark_whose_peer_is_not_installed_is_left_out(tmp_path, monkeypatch, capsys, missing):
    def measure():
        raise ModuleNotFoundError(name=missing)

    absent = module("Alpha")
    absent.measure = measure
    monkeypatch.setattr(run.importlib, "import_module", lambda name: absent)
    assert run.main(["data_index", "--page", str(tmp_path / "page.md")]) == 0
    assert f"left out, {missing} is not installed" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()


def test_measurements_are_written_as_json_too(tmp_path, monkeypatch):
    monkeypatch.setattr(run.importlib, "import_module", lambda name: module("Alpha"))
    page, file = tmp_path / "page.md", tmp_path / "found.json"
    assert run.main(["data_index", "--page", str(page), "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [row["advantage"] for row in found["data_index"]] == [2, 0.5, None, 2, None]
    assert found["data_index"][3]["spread"] == [1.9, 2.2] and "cores of" in found["machine"]
