"""Two checkpoints are equal when they hold the same bits, whatever layouts wrote them, and else told apart.

The reference is NumPy on whole tensors in float64; what is tested reads them in blocks of a few elements.
"""

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.checkpoint.load import TensorReader
from megalite.inspection import blocks
from megalite.inspection.blocks import BlockReader, kinds_of, ranges_of
from megalite.inspection.comparison import ABSENT, Change, changes, compare
from tests.checkpoint.test_load import layout, model_tensors, random_bits
from tests.checkpoint.test_reshard import SHAPES, borders
from tests.checkpoint.worlds import Cut, Tensors, cut_all, save_world

LAYOUTS = [(1, 1), (2, 1), (1, 3), (2, 2), (4, 1), (2, 3)]  # tensor and data parallel


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 7)
    monkeypatch.setattr(blocks, "KEPT_BYTES", 100)


def saved(folder: Path, tensors: Tensors, tp_size: int = 1, dp_size: int = 1) -> BlockReader:
    return BlockReader(TensorReader(save_world(folder, 1, cut_all(tensors, layout(tp_size, dp_size)))))


def compared(a: BlockReader, b: BlockReader):
    counted: list[int] = []
    found = compare(a, b, counted.append)
    assert sum(counted) == sum(tensor.num_elements for tensor in found.tensors)
    assert max(counted, default=0) <= 7  # no more of a tensor is in memory at a time
    return found


@pytest.mark.parametrize("other", LAYOUTS, ids=str)
def test_checkpoints_of_any_two_layouts_are_equal_and_any_one_bit_is_found(tmp_path, other):
    tensors = model_tensors()
    a, b = saved(tmp_path / "a", tensors), saved(tmp_path / "b", tensors, *other)
    found = compared(a, b)
    assert found.is_equal and {tensor.key for tensor in found.tensors} == tensors.keys()
    for number, (key, full) in enumerate(tensors.items()):
        place = (5 * number + 3) % full.numel()
        full.view(-1).view(torch.int32)[place] ^= 1 << number  # each time another bit of another tensor
        (difference,) = compared(a, saved(tmp_path / f"b{number}", tensors, *other)).different
        assert (difference.key, difference.num_different) == (key, 1)
        assert difference.place.at == tuple(np.unravel_index(place, tuple(full.shape)))
        full.view(-1).view(torch.int32)[place] ^= 1 << number


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_random_shapes_and_uneven_cuts_are_equal(data):
    shapes = data.draw(st.lists(SHAPES, min_size=1, max_size=3))
    tensors = {("weight", f"w{i}"): random_bits(shape, i) for i, shape in enumerate(shapes)}

    def reader(folder: Path) -> BlockReader:
        tp_borders, dp_borders = data.draw(borders(3)), data.draw(borders(3))
        dims = {f"w{i}": data.draw(st.sampled_from([None, *range(len(s))])) for i, s in enumerate(shapes)}
        cuts = cut_all(tensors, lambda name, _: Cut(dims[name], tp_borders, dp_borders))
        return BlockReader(TensorReader(save_world(folder, 1, cuts)))

    with tempfile.TemporaryDirectory() as folder:
        assert compared(reader(Path(folder, "a")), reader(Path(folder, "b"))).is_equal


@np.errstate(all="ignore")
def reference(a: torch.Tensor, b: torch.Tensor) -> tuple[int, float, float]:
    """Elements of other bits, largest absolute and relative difference."""
    other = a.numpy().view(np.int32) != b.numpy().view(np.int32)
    x, y = a.numpy().astype(np.float64)[other], b.numpy().astype(np.float64)[other]
    finite = np.isfinite(x) & np.isfinite(y)
    absolute = np.where(finite, np.abs(x - y), np.inf)
    largest = np.maximum(np.abs(x), np.abs(y))
    relative = np.where(finite, np.where(largest == 0, 0, absolute / largest), np.inf)
    return int(other.sum()), float(absolute.max(initial=0)), float(relative.max(initial=0))


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_differences_are_those_of_numpy(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    a = model_tensors(scale=9 * seed) if seed < 2 else {("weight", "embed"): torch.randn(10, 6)}
    b = {key: full.clone() for key, full in a.items()}
    for full in b.values():
        chosen = torch.rand(full.shape, generator=generator) < 0.3
        full[chosen] += torch.randn(int(chosen.sum()), generator=generator) / 8
    found = compared(saved(tmp_path / "a", a), saved(tmp_path / "b", b, 2, 2))
    assert not found.is_equal
    for tensor in found.tensors:
        what = tensor.num_different, tensor.largest_absolute, tensor.largest_relative
        assert what == reference(a[tensor.key], b[tensor.key])  # both in float64, so to the last bit
        if tensor.place:
            at = tensor.place.at
            np.testing.assert_equal(tensor.place.a, float(a[tensor.key][at]))
            np.testing.assert_equal(tensor.place.b, float(b[tensor.key][at]))


@pytest.mark.parametrize(
    ("a", "b", "absolute", "relative"),
    [
        (0.0, -0.0, 0.0, 0.0),
        (1.0, 1.0 + 2**-23, 2**-23, 2**-23 / (1 + 2**-23)),
        (3e38, -3e38, 6e38, 2.0),
        (1e-45, 0.0, 2**-149, 1.0),
        (1.0, math.inf, math.inf, math.inf),
        (math.inf, -math.inf, math.inf, math.inf),
        (math.nan, 1.0, math.inf, math.inf),
    ],
)
def test_numbers_at_the_ends_of_the_range(tmp_path, a, b, absolute, relative):
    numbers = torch.full((6,), 2.0), torch.full((6,), 2.0)
    numbers[0][3], numbers[1][3] = a, b
    readers = [saved(tmp_path / str(i), {("weight", "norm"): one}) for i, one in enumerate(numbers)]
    (difference,) = compared(*readers).different
    assert difference.num_different == 1 and difference.place.at == (3,)
    assert difference.largest_absolute == pytest.approx(absolute, rel=1e-7)  # 3e38 is rounded to float32
    assert difference.largest_relative == relative


def test_not_finite_numbers_of_the_same_bits_are_equal(tmp_path):
    tensors = {("weight", "norm"): torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45, 1.0])}
    assert compared(saved(tmp_path / "a", tensors), saved(tmp_path / "b", tensors, 1, 3)).is_equal


def test_what_only_one_has_and_other_shapes_are_differences(tmp_path):
    norm, row = ("weight", "norm"), ("weight", "row")
    a = {norm: torch.ones(6), row: torch.ones(6, 8), ("exp_avg", "norm"): torch.ones(6)}
    b = {norm: torch.ones(6), row: torch.ones(8, 6), ("buffer", "norm"): torch.ones(6)}
    found = compared(saved(tmp_path / "a", a), saved(tmp_path / "b", b))
    assert [tensor.key for tensor in found.tensors] == [norm] and not found.different
    assert found.other_shapes == {row: ((6, 8), (8, 6))}
    assert (found.only_in_a, found.only_in_b) == ([("exp_avg", "norm")], [("buffer", "norm")])
    assert not found.is_equal


@pytest.mark.parametrize("which", ["only in a", "only in b", "another shape"])
def test_each_of_these_alone_is_a_difference(tmp_path, which):
    whole = {("weight", "norm"): torch.ones(6), ("weight", "row"): torch.ones(6, 8)}
    part = {("weight", "norm"): torch.ones(6)}
    if which == "another shape":
        part["weight", "row"] = torch.ones(8, 6)
    a, b = (part, whole) if which == "only in b" else (whole, part)
    assert not compared(saved(tmp_path / "a", a), saved(tmp_path / "b", b)).is_equal


def test_files_that_were_read_are_let_go(tmp_path, monkeypatch):
    reader, closed = saved(tmp_path, model_tensors(), 2, 2), []
    monkeypatch.setattr(reader._reader, "let_go", lambda: closed.append(True))
    for key in reader.shapes:
        for where in ranges_of(reader.shapes[key]):
            reader.read(key, where)
    num_bytes = sum(4 * math.prod(shape) for shape in reader.shapes.values())
    assert num_bytes // 128 - 1 <= len(closed) <= num_bytes // 100


def test_kinds_are_told_with_the_model_first():
    assert kinds_of((kind, "w") for kind in ("exp_avg", "weight", "exp_avg_sq", "buffer")) == [
        "weight",
        "buffer",
        "exp_avg",
        "exp_avg_sq",
    ]


def test_changes_are_named_by_dotted_keys():
    a = {
        "step": 4,
        "parallel": {"tp_size": 2, "same": None},
        "data": [{"prefix": "x"}],
        "targets": ["q", "k"],
    }
    b = {"step": 4.0, "parallel": {"tp_size": 1, "same": None}, "data": [{"prefix": "y"}, {"prefix": "z"}]}
    assert changes(a, a) == []
    assert changes(a, b) == [
        Change("step", 4, 4.0),
        Change("parallel.tp_size", 2, 1),
        Change("data[0].prefix", "x", "y"),
        Change("targets", ["q", "k"], ABSENT),
        Change("data[1].prefix", ABSENT, "z"),
    ]
