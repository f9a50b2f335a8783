"""The check of readers notices what a reader would read differently. No environment is made here."""

import json

import pytest

from tests.readers.check import ALONE, NOT_RECOGNIZED, judge, table
from tests.readers.folders import make_folders
from tests.readers.read_transformers import read

GOOD = {"loading": [], "logits": 1e-6, "greedy": True, "encode": True, "decode": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    names = ["experts", "dense-begin-of-text"]
    return dict(zip(names, make_folders(tmp_path_factory.mktemp("readers") / "folders", names), strict=True))


def edited(path, **changes):
    """The text of a JSON file before it was changed."""
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | changes))
    return before


@pytest.mark.parametrize("name", ["experts", "dense-begin-of-text"])
def test_transformers_agrees_with_the_reference(folders, name):
    outcome = read(folders[name])
    assert judge("transformers-5", name, outcome)[1], outcome


@pytest.mark.parametrize(
    ("name", "file", "changes", "differs"),
    [
        ("experts", "config.json", {"routed_scaling_factor": 2.4}, "greedy"),
        ("experts", "config.json", {"num_hidden_layers": 2}, None),
        ("dense-begin-of-text", "config.json", {"rope_parameters": None, "rope_theta": 500.0}, "greedy"),
        ("dense-begin-of-text", "tokenizer.json", {"post_processor": None}, "encode"),
        ("dense-begin-of-text", "tokenizer.json", {"decoder": None}, "decode"),
    ],
    ids=str,
)
def test_a_wrong_folder_is_noticed(folders, name, file, changes, differs):
    path = folders[name] / "exported" / file
    before = edited(path, **changes)
    text, as_expected = judge("transformers-5", name, read(folders[name]))
    path.write_text(before)
    assert not as_expected and (differs is None or f"{differs} differs" in text)


def test_only_what_is_known_to_differ_may(folders):
    assert judge("transformers-5", "sharded", GOOD) == ("1.0e-06", True)
    for wrong in ({"logits": 2e-5}, {"logits": float("nan")}, {"greedy": False}, {"loading": ["missing"]}):
        assert not judge("transformers-5", "sharded", GOOD | wrong)[1]
    assert judge("transformers-5", "qwen2", GOOD | {"encode": False}) == ("1.0e-06, encode differs", True)
    assert not judge("transformers-5", "qwen2", GOOD)[1]
    assert not judge("transformers-4", "qwen2", GOOD | {"encode": False})[1]


def test_a_refusal_is_expected_for_its_reason_alone():
    assert judge(ALONE, "sharded", {"refused": f"NotImplementedError: {NOT_RECOGNIZED}"}) == ("refused", True)
    assert judge(ALONE, "sharded", {"refused": "killed"}) == ("refused: killed", False)
    assert not judge(ALONE, "sharded", GOOD)[1]
    assert not judge("llama.cpp", "sharded", {"refused": NOT_RECOGNIZED})[1]


def test_the_table_has_a_row_for_each_folder():
    rows = {"one 1.0": {"a": "1e-6", "b": "refused"}, "two": {"a": "0", "b": "0"}}
    assert table(rows, ["a", "b"]).splitlines()[2:] == ["| a | 1e-6 | 0 |", "| b | refused | 0 |"]
