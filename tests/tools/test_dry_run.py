"""tools/dry_run.py: what it tells, and what it refuses in one line."""

import json

import pytest

from tools.dry_run import main

ZERO3 = ["--deepspeed_config", "configs/deepspeed/zero3_bf16.json"]  # of 16 samples, 2 a micro batch
SMALL = ["parallel.tp_size=2", "parallel.pp_size=2"]


def test_a_job_of_32_ranks_is_told_as_json_and_for_people(capsys):
    assert main([*ZERO3, *SMALL, "--ranks", "32", "--gpus-per-node", "4", "--json"]) == 0
    out, told = capsys.readouterr()
    facts = json.loads(out)
    assert facts["ranks"] == 32 and facts["faults"] == [] and facts["entries"] > 32 * 20
    assert [stage["pp_rank"] for stage in facts["stages"]] == [0, 1]
    links = facts["links"]
    assert links["tp"]["between_nodes_bytes"] == 0 < links["tp"]["in_node_bytes"]  # neighbours share a node
    assert links["pp"]["in_node_bytes"] == 0 < links["pp"]["between_nodes_bytes"]
    assert "walked, place 1 of the pipeline" in told

    assert main([*ZERO3, *SMALL, "--ranks", "32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["place", "0", "1"]
    assert {line.split("  ")[0] for line in lines} >= {"group", *links}
    assert lines[0] == "memory of a rank, by its place in the pipeline"
    assert lines[-1].endswith("every send met its receive, every collective its members")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--ranks", "63"], "63 processes cannot be divided into tp_size 2 x pp_size 2"),
        (["--ranks", "0"], "--ranks is 0"),
        (["--ranks", "32", "--gpus-per-node", "0"], "--gpus-per-node is 0"),
        (["--ranks", "800", "parallel.pp_size=200"], "parallel.pp_size 200 exceeds model.num_hidden_layers"),
        (["--ranks", "64", "parallel.tp_size=32"], "is not divisible by parallel.tp_size 32"),
        (["--ranks", "32", "optimizer.name=muon"], "add optimizer.name=adamw"),
        (["--ranks", "32", "parallel.pipeline_schedule=zbx"], "pipeline_schedule"),
        (["--ranks", "many"], "invalid int value: 'many'"),
    ],
)
def test_an_impossible_layout_is_refused_in_one_line(words, reason, capsys):
    assert main([*ZERO3, *SMALL, *words]) == 2
    out, told = capsys.readouterr()
    assert out == "" and told.startswith("error: ") and told.count("\n") == 1
    assert reason in told
