"""Versions that a checkpoint and a run have, compared."""

import pytest

from megalite.training.versions import PACKAGES, changed_versions, versions

HERE = {"megalite": "0.2", "torch": "2.13.0", "deepspeed": "0.19.8", "numpy": "unknown"}


@pytest.mark.parametrize(
    ("before", "told"),
    [
        ({}, None),
        (HERE, None),
        (HERE | {"torch": "2.12.0"}, "torch 2.12.0 -> 2.13.0"),
        (
            HERE | {"megalite": "0.1", "deepspeed": "0.18.0"},
            "megalite 0.1 -> 0.2, deepspeed 0.18.0 -> 0.19.8",
        ),
        (HERE | {"numpy": "2.0", "torch": "unknown", "old": "1"}, None),
    ],
)
def test_what_changed_is_told_with_both_versions(before, told):
    assert changed_versions(before, HERE) == told


def test_all_packages_have_one():
    assert tuple(versions()) == PACKAGES and versions()["torch"][0].isdecimal()
