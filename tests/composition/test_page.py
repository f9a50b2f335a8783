"""The table of docs/composition.md has no empty cell, and each cell is true."""

import importlib
import json
import re
from pathlib import Path

import pytest

from megalite.config.section import ConfigError
from megalite.training.command import configure
from tests.composition.cases import COMPOSITIONS
from tests.composition.evidence import evidence
from tests.composition.features import ALL_PAIRS, FEATURES, IMPOSSIBLE, NAMES, REFUSED, Switch
from tests.composition.page import PAGE, cells, section, with_section

TEXT = PAGE.read_text(encoding="utf-8")
TESTS = Path(__file__).parent.parent
BASE = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1}


def pair_id(pair: frozenset[str]) -> str:
    return " x ".join(sorted(pair, key=NAMES.index))


def table_of_page() -> dict[frozenset[str], str]:
    """As a reader sees it: pair -> cell."""
    lines = re.findall(r"^\| (\d+) \| (.*) \|$", TEXT, flags=re.M)
    names = [rest.split(" | ")[0] for _, rest in lines]
    assert [int(number) for number, _ in lines] == list(range(1, len(names) + 1))
    found = {}
    for place, (_, rest) in enumerate(lines):
        name, *row = (part.strip() for part in rest.split("|"))
        found |= {frozenset((name, names[i])): row[i] for i in range(place)}
    return found


def test_the_page_is_what_the_tests_run():
    assert with_section(TEXT, section()) == TEXT, "run: python -m tests.composition.page"


def test_every_pair_of_features_has_a_cell_and_none_is_empty():
    table = table_of_page()
    assert table.keys() == set(ALL_PAIRS) and len(table) == len(NAMES) * (len(NAMES) - 1) // 2
    assert [pair_id(pair) for pair, cell in table.items() if not cell] == []


def test_control_without_the_compositions_cells_are_empty():
    without = cells(evidence([]))
    assert len(set(ALL_PAIRS) - without.keys()) > 100
    assert set(ALL_PAIRS) <= cells(evidence(COMPOSITIONS)).keys()


def test_every_composition_is_needed_or_few_are_not():
    """One that adds no pair costs two seconds for nothing."""
    for left_out in range(len(COMPOSITIONS)):
        rest = COMPOSITIONS[:left_out] + COMPOSITIONS[left_out + 1 :]
        assert set(ALL_PAIRS) - cells(evidence(rest)).keys(), COMPOSITIONS[left_out]


def test_what_is_refused_or_impossible_is_not_tested_as_well():
    for found in evidence(COMPOSITIONS):
        assert not found.pairs & (REFUSED.keys() | IMPOSSIBLE.keys()), found.test


def test_every_test_that_a_letter_stands_for_compares_with_one_process():
    named = re.findall(r"^\| ([a-h]) \| `(tests/.*?)` \|$", TEXT, flags=re.M)
    letters = {cell for cell in table_of_page().values() if len(cell) == 1 and cell.isalpha()}
    assert letters <= {letter for letter, _ in named}
    for _, path in named:
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        assert any(name.startswith("test_") for name in vars(module)), path


def test_every_test_of_a_bug_that_the_page_names_exists_and_every_one_is_named():
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    written = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", written, flags=re.M))
    assert named and named <= defined
    bugs = (TESTS / "composition" / "test_bugs.py").read_text(encoding="utf-8")
    assert set(re.findall(r"^def (test_\w+)", bugs, flags=re.M)) <= named


def together(switches: list[Switch], folder: Path) -> None:
    """Start a run that has these on, as far as its configuration is read; the first one has its way."""
    values: dict[str, str] = {}
    for switch in switches:
        values = dict(setting.split("=", 1) for setting in switch.run) | values
    raw = BASE | {"zero_optimization": {"stage": 3}}
    for switch in switches:
        raw |= switch.deepspeed
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(raw))
    world_size = 2  # data-parallel ranks
    for axis in ("tp_size", "pp_size", "cp_size"):
        world_size *= int(values.get(f"parallel.{axis}", 1))
    settings = [f"{key}={value}" for key, value in values.items()]
    configure(["--deepspeed_config", str(path), *settings], world_size, "pretrain")


@pytest.mark.parametrize("pair", sorted(REFUSED, key=pair_id), ids=pair_id)
def test_what_the_page_calls_refused_is_refused_in_one_line(pair, tmp_path):
    one, other = (FEATURES[name] for name in sorted(pair, key=NAMES.index))
    for alone in (one, other):
        together([alone], tmp_path)
    with pytest.raises(ConfigError) as refusal:
        together([one, other], tmp_path)
    assert REFUSED[pair] in str(refusal.value) and "\n" not in str(refusal.value)


def test_no_other_pair_is_refused(tmp_path):
    """Of what settings turn on."""
    refused = []
    for pair in ALL_PAIRS:
        switches = [FEATURES[name] for name in sorted(pair, key=NAMES.index)]
        if pair in REFUSED or pair in IMPOSSIBLE or not all(one.run or one.deepspeed for one in switches):
            continue
        try:
            together(switches, tmp_path)
        except ConfigError as error:
            refused.append(f"{pair_id(pair)}: {error}")
    assert refused == []
