"""Facts as people and machines read them."""

import json
import math

import pytest

from megalite.inspection.table import aligned, as_json, bytes_in_words


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_310_000, "1.31 MB"),
        (999_499, "999 kB"),
        (999_600, "1 MB"),
        (12_400_000_000, "12.4 GB"),
        (3_210_000_000_000_000, "3,210 TB"),
    ],
)
def test_sizes_in_words(num_bytes, words):
    assert bytes_in_words(num_bytes) == words


def test_columns_are_as_wide_as_their_widest_cell():
    assert list(aligned([["a", "b", "c"], ["long", "1", "x"], ["", "22", ""]], "lrl")) == [
        "a      b  c",
        "long   1  x",
        "      22",
    ]


def test_json_has_no_numbers_that_json_has_not():
    facts = {"a": [math.nan, {"b": (math.inf, 1.5)}], "c": None, "d": True}
    expected = {"a": ["nan", {"b": ["inf", 1.5]}], "c": None, "d": True}
    assert json.loads(as_json(facts), parse_constant=pytest.fail) == expected
