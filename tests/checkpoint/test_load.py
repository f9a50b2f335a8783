"""Any layout loads any checkpoint, bit for bit; a damaged one is noticed."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megalite.checkpoint import damage, load
from megalite.checkpoint.format import CheckpointError, Piece
from megalite.checkpoint.load import (
    PLACES,
    TensorReader,
    find_checkpoint,
    load_pieces,
    read_tensor,
    require_checkpoint,
)
from tests.checkpoint.test_reshard import SHAPES, borders
from tests.checkpoint.worlds import Cut, alone, blank, cut_all, even_cut, run_world, same_bits, save_world

KINDS = ("weight", "exp_avg", "exp_avg_sq")
SIZES = {"embed": (10, 6), "column": (8, 6), "row": (6, 8), "norm": (6,)}


def random_bits(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any float32 at all: NaNs with payloads, denormals, infinities, negative zeros."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32).view(torch.float32)


def model_tensors(scale: int = 0) -> dict[tuple[str, str], torch.Tensor]:
    pairs = [(kind, name) for kind in KINDS for name in SIZES]
    return {pair: random_bits(SIZES[pair[1]], scale + i) for i, pair in enumerate(pairs)}


def layout(tp_size: int, dp_size: int):
    dims = {"embed": 0, "column": 0, "row": 1, "norm": None}
    return lambda name, _: even_cut(dims[name], tp_size, dp_size)


def assert_filled(ranks: list[list[Piece]], expected: list[list[Piece]]) -> None:
    for pieces, wanted in zip(ranks, expected, strict=True):
        assert all(same_bits(a.tensor, b.tensor) for a, b in zip(pieces, wanted, strict=True))


@pytest.mark.parametrize("source", [(1, 1), (2, 2), (4, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("target", [(1, 1), (2, 2), (2, 3), (1, 4)], ids=str)
def test_any_layout_loads_any_checkpoint_bit_for_bit(tmp_path, source, target):
    tensors = model_tensors()
    checkpoint = save_world(tmp_path, 1, cut_all(tensors, layout(*source)))
    expected = cut_all(tensors, layout(*target))
    ranks = [blank(pieces) for pieces in expected]
    run_world(len(ranks), lambda rank, gather: load_pieces(checkpoint, ranks[rank], rank=rank, gather=gather))
    assert_filled(ranks, expected)
    for (kind, name), full in tensors.items():
        assert same_bits(read_tensor(checkpoint, kind, name), full)
    other = cut_all(model_tensors(scale=99), layout(*target))  # the comparison can fail
    with pytest.raises(AssertionError):
        assert_filled(ranks, other)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_random_shapes_and_uneven_cuts_survive_the_files(data):
    shapes = data.draw(st.lists(SHAPES, min_size=1, max_size=3))
    tensors = {("weight", f"w{i}"): random_bits(shape, i) for i, shape in enumerate(shapes)}

    def draw_cuts() -> list[list[Piece]]:
        tp_borders, dp_borders = data.draw(borders(3)), data.draw(borders(3))
        dims = {f"w{i}": data.draw(st.sampled_from([None, *range(len(s))])) for i, s in enumerate(shapes)}
        return cut_all(tensors, lambda name, _: Cut(dims[name], tp_borders, dp_borders))

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_world(Path(folder), 1, draw_cuts())
        expected = draw_cuts()
        ranks = [blank(pieces) for pieces in expected]
        for rank, pieces in enumerate(ranks):
            load_pieces(checkpoint, pieces, rank=rank)
        assert_filled(ranks, expected)


def test_an_unchanged_layout_opens_its_own_file_and_the_neighbours_that_own_the_rest(tmp_path, monkeypatch):
    ranks = cut_all(model_tensors(), layout(2, 4))
    checkpoint = save_world(tmp_path, 1, ranks)
    opened = []
    real = load.TensorFile

    def spy(path):
        opened.append(path.name)
        return real(path)

    monkeypatch.setattr(load, "TensorFile", spy)
    load_pieces(checkpoint, blank(ranks[4]), rank=4)
    assert set(opened) == {"rank-00004.safetensors"}
    opened.clear()
    load_pieces(checkpoint, blank(ranks[5]), rank=5)  # tp rank 1 owns no norm: rank 4 has it
    assert set(opened) == {"rank-00004.safetensors", "rank-00005.safetensors"}


def test_loading_writes_into_the_live_tensor_and_nowhere_else(tmp_path):
    full = random_bits((4, 4), 0)
    checkpoint = save_world(tmp_path, 1, cut_all({("weight", "w"): full}, lambda *_: even_cut(0)))
    storage = torch.full((10,), 7.0)
    piece = Piece("w", "weight", (4, 4), (2, 0), (2, 4), 1, storage[2:8])
    load_pieces(checkpoint, [piece])
    assert same_bits(storage[2:8], full.reshape(-1)[9:15])
    assert storage[:2].eq(7).all() and storage[8:].eq(7).all()


def test_a_lower_precision_copy_is_filled_with_the_rounded_weights(tmp_path):
    full = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    checkpoint = save_world(tmp_path, 1, cut_all({("weight", "w"): full}, lambda *_: even_cut(1, tp_size=2)))
    master, copy = torch.zeros(8), torch.zeros(8, dtype=torch.bfloat16)
    where = ("w", "weight", (4, 4), (2, 0), (2, 4), 0)
    load_pieces(checkpoint, [Piece(*where, master), Piece(*where, copy, owned=False)])
    assert master.equal(full.reshape(-1)[8:])
    assert copy.equal(master.bfloat16())


STORED = {torch.float8_e4m3fn: torch.float32}  # others as they are


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_a_weight_that_lives_in_few_bits_alone_survives_exactly_in_any_layout(tmp_path, dtype):
    full = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = {("weight", "column"): full, ("weight", "norm"): torch.randn(6)}  # beside one in float32
    checkpoint = save_world(tmp_path, 1, cut_all(tensors, layout(2, 3)))
    read = read_tensor(checkpoint, "weight", "column")
    assert read.dtype == torch.float32 and read.equal(full.float())
    files = [load_file(path) for path in checkpoint.glob("*.safetensors")]
    assert {tensor.dtype for file in files for tensor in file.values()} == {
        STORED.get(dtype, dtype),
        torch.float32,
    }
    expected = cut_all(tensors, layout(1, 2))
    ranks = [blank(pieces) for pieces in expected]
    run_world(2, lambda rank, gather: load_pieces(checkpoint, ranks[rank], rank=rank, gather=gather))
    assert {piece.tensor.dtype for pieces in ranks for piece in pieces} == {dtype, torch.float32}
    for pieces, wanted in zip(ranks, expected, strict=True):
        assert all(a.tensor.float().equal(b.tensor.float()) for a, b in zip(pieces, wanted, strict=True))


def test_a_state_may_have_any_kind(tmp_path):
    """A kind is a word: an optimizer's own, or that of state which is no parameter."""
    pairs = [("weight", "norm"), ("momentum", "norm"), ("scale/row", "norm"), ("buffer", "bias")]
    tensors = {pair: random_bits((6,), seed) for seed, pair in enumerate(pairs)}
    checkpoint = save_world(tmp_path, 1, cut_all(tensors, lambda *_: even_cut(None, dp_size=2)))
    ranks = [blank(cut_all(tensors, lambda *_: even_cut(None))[0])]
    run_world(1, lambda rank, gather: load_pieces(checkpoint, ranks[rank], gather=gather))
    for piece in ranks[0]:
        assert same_bits(piece.tensor, tensors[piece.kind, piece.name])
    assert not same_bits(ranks[0][0].tensor, ranks[0][1].tensor)


# What does not fit


def saved(tmp_path: Path, step: int = 1) -> Path:
    return save_world(
        tmp_path, step, cut_all(model_tensors(), layout(2, 1)), files={"config.yaml": "seed: 1\n"}
    )


def whole(name: str, shape: tuple[int, ...], kind: str = "weight") -> Piece:
    flat = torch.full(shape, torch.nan).reshape(-1)
    return Piece(name, kind, shape, (0,) * len(shape), shape, 0, flat)


def test_a_tensor_that_is_not_in_the_checkpoint_is_named_and_nothing_is_written(tmp_path):
    present, absent = whole("norm", (6,)), whole("absent", (6,))
    with pytest.raises(CheckpointError, match="has no weight absent"):
        load_pieces(saved(tmp_path), [present, absent])
    assert present.tensor.isnan().all()


def test_another_shape_is_an_error_with_both_shapes(tmp_path):
    with pytest.raises(CheckpointError, match=r"norm has shape \[6\] in .* and \[7\] in this model"):
        load_pieces(saved(tmp_path), [whole("norm", (7,))])


def test_a_tensor_that_no_rank_asks_for_is_an_error_when_ranks_load_together(tmp_path):
    checkpoint = saved(tmp_path)
    pieces = [whole(name, shape, kind) for kind in KINDS for name, shape in SIZES.items()]
    load_pieces(checkpoint, pieces, gather=alone)
    pieces = [piece for piece in pieces if (piece.kind, piece.name) != ("weight", "row")]
    load_pieces(checkpoint, pieces)
    with pytest.raises(CheckpointError, match="1 tensors that this model has not, weight row for one"):
        load_pieces(checkpoint, pieces, gather=alone)


@pytest.mark.parametrize(
    "kinds", [("weight", "momentum"), ("weight", "exp_avg"), ("weight",), (*KINDS, "buffer")]
)
def test_the_state_of_another_optimizer_is_refused_with_both_sets_of_kinds(tmp_path, kinds):
    checkpoint = saved(tmp_path)
    pieces = [whole(name, shape, kind) for kind in kinds for name, shape in SIZES.items()]
    ours = ", ".join(sorted(kinds))
    with pytest.raises(
        CheckpointError, match=rf"holds exp_avg, exp_avg_sq, weight per tensor and this run has {ours}: keep"
    ):
        load_pieces(checkpoint, pieces, gather=alone)
    assert all(piece.tensor.isnan().all() for piece in pieces)


def test_a_start_from_another_runs_weights_ignores_its_optimizer_and_nothing_else(tmp_path):
    checkpoint = saved(tmp_path)
    pieces = [whole(name, shape) for name, shape in SIZES.items()]
    load_pieces(checkpoint, pieces, gather=alone, ignore_other_kinds=True)
    tensors = model_tensors()
    assert all(same_bits(piece.tensor, tensors["weight", piece.name].view(-1)) for piece in pieces)
    with pytest.raises(CheckpointError, match="1 tensors that this model has not"):
        load_pieces(checkpoint, pieces[1:], gather=alone, ignore_other_kinds=True)
    with pytest.raises(CheckpointError, match="this run has momentum: keep"):
        load_pieces(checkpoint, [whole("norm", (6,), "momentum")], gather=alone, ignore_other_kinds=True)


def test_weights_alone_are_a_checkpoint(tmp_path):
    tensors = {pair: full for pair, full in model_tensors().items() if pair[0] == "weight"}
    checkpoint = save_world(tmp_path, 1, cut_all(tensors, layout(2, 2)))
    reader = TensorReader(checkpoint)
    assert all(same_bits(reader.read(*pair), full) for pair, full in tensors.items())
    pieces = [whole(name, shape, kind) for kind in KINDS for name, shape in SIZES.items()]
    with pytest.raises(CheckpointError, match="holds weight per tensor and this run has exp_avg, exp_avg_sq"):
        load_pieces(checkpoint, pieces, gather=alone)


def test_an_error_on_one_rank_is_an_error_on_all(tmp_path):
    checkpoint = saved(tmp_path)
    full = [whole(name, shape) for name, shape in (("embed", (10, 6)), ("column", (8, 6)), ("row", (6, 8)))]
    ranks = [full, [whole("norm", (7,))]]
    results = run_world(
        2, lambda rank, gather: load_pieces(checkpoint, ranks[rank], rank=rank, gather=gather)
    )
    assert [type(result) for result in results] == [CheckpointError, CheckpointError]
    assert str(results[0]) == str(results[1])
    assert all(piece.tensor.isnan().all() for piece in full)


# What is damaged


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILES = ["manifest.json", "state.json", "config.yaml", "rank-00000.safetensors", "rank-00001.safetensors"]


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink], ids=["flip", "truncate", "delete"])
@pytest.mark.parametrize("file", FILES)
def test_damage_to_any_file_falls_back_to_the_older_checkpoint_and_says_so(tmp_path, file, damage):
    older, newer = saved(tmp_path, 100), saved(tmp_path, 200)
    assert find_checkpoint(tmp_path, report=pytest.fail) == newer
    damage(newer / file)
    lines: list[str] = []
    assert find_checkpoint(tmp_path, report=lines.append) == older
    (line,) = lines
    assert line.startswith("checkpoint step-00000200 is not valid and is skipped: ") and file in line


@pytest.mark.parametrize("file", FILES)
def test_many_ranks_share_out_the_checksums_and_agree(tmp_path, monkeypatch, file):
    older, newer = saved(tmp_path, 100), saved(tmp_path, 200)
    flip_a_byte(newer / file)
    hashed: list[str] = []
    real = damage.hash_file

    def spy(path):
        hashed.append(str(path))
        return real(path)

    monkeypatch.setattr(damage, "hash_file", spy)
    lines: list[str] = []
    found = run_world(
        3,
        lambda rank, gather: find_checkpoint(tmp_path, lines.append, rank=rank, world_size=3, gather=gather),
    )
    assert found == [older] * 3
    assert len(lines) == 1
    assert len(hashed) == len(set(hashed))  # no file is read twice


def test_an_incomplete_folder_is_not_looked_at(tmp_path):
    checkpoint = saved(tmp_path, 100)
    shutil.copytree(checkpoint, tmp_path / "step-00000200.tmp")
    assert find_checkpoint(tmp_path, report=pytest.fail) == checkpoint


def test_a_folder_under_another_steps_name_is_not_valid(tmp_path):
    saved(tmp_path, 100).rename(tmp_path / "step-00000300")
    with pytest.raises(CheckpointError, match="its manifest is of step 100"):
        find_checkpoint(tmp_path)


def test_a_step_folder_is_taken_as_it_is_or_refused(tmp_path):
    older, newer = saved(tmp_path, 100), saved(tmp_path, 200)
    assert find_checkpoint(older) == older
    flip_a_byte(newer / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors does not match its sha256"):
        find_checkpoint(newer)


def test_no_checkpoint_is_none_and_only_damaged_ones_are_an_error(tmp_path):
    assert find_checkpoint(tmp_path / "absent") is None
    assert find_checkpoint(tmp_path) is None
    truncate(saved(tmp_path) / "state.json")
    with pytest.raises(CheckpointError, match=r"no valid checkpoint .* step-00000001: state.json has"):
        find_checkpoint(tmp_path, report=lambda line: None)


def test_a_run_folder_its_checkpoints_and_a_step_name_the_same_checkpoint(tmp_path):
    newest = [saved(tmp_path / "checkpoints", step=step) for step in (1, 2)][-1]
    for path in (tmp_path, tmp_path / "checkpoints", newest):
        assert require_checkpoint(path, report=pytest.fail) == newest


def test_a_path_without_a_checkpoint_is_told_with_what_may_be_named(tmp_path):
    with pytest.raises(CheckpointError, match=rf"^no checkpoint in {tmp_path}: expected {PLACES}$"):
        require_checkpoint(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"^here: .* is a Hugging Face folder: make a checkpoint of it"):
        require_checkpoint(tmp_path, setting="here")


def test_a_manifest_that_still_reads_well_but_was_changed_is_noticed(tmp_path):
    manifest = saved(tmp_path) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"norm"', '"nurm"'))
    with pytest.raises(CheckpointError, match=r"manifest.json does not match its own sha256"):
        find_checkpoint(tmp_path, report=lambda line: None)


def test_a_newer_format_is_refused_by_its_number(tmp_path):
    manifest = saved(tmp_path) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CheckpointError, match="has format version 2; this megalite reads 1"):
        find_checkpoint(tmp_path, report=lambda line: None)
