"""Checkpoints are described as their files say, damage is named, and two are told apart or found equal.

The reference for tensors is NumPy on the raw bytes of the files, read as docs/checkpoint_format.md describes.
"""

import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalite.checkpoint import damage
from megalite.checkpoint.base import BASE, Base
from megalite.config.load import dump_run
from megalite.inspection import blocks, source
from tests.checkpoint.adapters import merged, save_tuned
from tests.checkpoint.llamas import random_llama, save_llama, tensors_of, tiny_run
from tests.checkpoint.worlds import Tensors, cut_all, even_cut, save_world
from tools import inspect_checkpoint

DTYPES = {"F32": np.float32}
STATE = {
    "step": 20,
    "consumed_samples": 320,
    "consumed_tokens": 40960,
    "optimizer_steps": 20,
    "versions": {"megalite": "0.1.0", "torch": "2.13.0"},
    "data": {"train": [{"prefix": "data/a", "weight": 0.25}, {"prefix": "data/b", "weight": 0.75}]},
}
DEEPSPEED = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}


@pytest.fixture
def inspect(capsys):
    """The command: (exit status, stdout, stderr)."""

    def inspect(*words: Any) -> tuple[int, str, str]:
        status = inspect_checkpoint.main([str(word) for word in words])
        return status, *capsys.readouterr()

    return inspect


@pytest.fixture
def as_json(inspect):
    def as_json(*words: Any) -> dict[str, Any]:
        return json.loads(inspect(*words, "--json")[1], parse_constant=pytest.fail)

    return as_json


def tensors(seed: int = 0) -> Tensors:
    """A model's, whose names and shapes are no matter here; some numbers are not finite."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (10, 6), "column": (8, 6), "row": (6, 8), "norm": (6,)}
    found = {
        (kind, name): torch.randn(shape, generator=generator)
        for kind in ("weight", "exp_avg", "exp_avg_sq")
        for name, shape in shapes.items()
    }
    found["buffer", "bias"] = torch.tensor([1.0, math.nan, math.inf, -2.0])
    return found


def save(
    root: Path,
    step: int = 20,
    tp_size: int = 2,
    dp_size: int = 2,
    full: Tensors | None = None,
    **parallel: Any,
) -> Path:
    dims = {"embed": 0, "column": 0, "row": 1, "norm": None, "bias": None}
    ranks = cut_all(full or tensors(), lambda name, _: even_cut(dims[name], tp_size, dp_size))
    run = tiny_run()
    run = run.model_copy(update={"parallel": run.parallel.model_copy(update={"tp_size": tp_size} | parallel)})
    files = {"config.yaml": dump_run(run), "deepspeed.json": json.dumps(DEEPSPEED)}
    return save_world(root, step, ranks, STATE | {"step": step, "consumed_tokens": 2048 * step}, files)


def write_rows(run_dir: Path, text: str = "") -> None:
    rows = [{"step": step, "loss": 6 / step} for step in range(1, 41)]
    rows[19]["validation_loss"] = 0.3125
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + text)


def raw_pieces(checkpoint: Path):
    """(file, table row, place of its first byte in the file, its numbers) of every piece."""
    for file in sorted(checkpoint.glob("rank-*.safetensors")):
        content = file.read_bytes()
        header_size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + header_size])
        for row in json.loads(header["__metadata__"]["pieces"]):
            start, end = (8 + header_size + place for place in header[row[0]]["data_offsets"])
            yield file, row, start, np.frombuffer(content[start:end], DTYPES[header[row[0]]["dtype"]])


def raw_tensors(checkpoint: Path) -> dict[tuple[str, str], np.ndarray]:
    """As the documentation tells a reader without megalite."""
    found: dict[tuple[str, str], np.ndarray] = {}
    for _, (_, kind, name, shape, (start, box_shape, first, size)), _, numbers in raw_pieces(checkpoint):
        full = found.setdefault((kind, name), np.empty(shape, np.float32))
        cut = tuple(slice(s, s + n) for s, n in zip(start, box_shape, strict=True))
        flat = full[cut].copy().reshape(-1)
        flat[first : first + size] = numbers
        full[cut] = flat.reshape(box_shape)
    return found


def flip_a_bit(path: Path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


# A run


@pytest.mark.parametrize("where", ["", "checkpoints"])
def test_a_run_is_listed(tmp_path, inspect, where):
    write_rows(tmp_path, text='{"step": 41, "lo')  # the run goes on, and writes a row
    folders = [save(tmp_path / "checkpoints", step) for step in (10, 20, 30)]
    for folder, age_seconds in zip(folders, (180_000, 9_000, 3), strict=True):
        os.utime(folder / "manifest.json", (0, time.time() - age_seconds))
    shutil.copytree(folders[2], tmp_path / "checkpoints" / "step-00000040.tmp")
    (folders[2] / "rank-00001.safetensors").unlink()
    status, shown, _ = inspect(tmp_path / where)
    assert status == 1
    title, *rows = [line.split() for line in shown.splitlines()]
    assert title == ["step", "size", "age", "tokens", "loss", "validation", "loss"]
    size_bytes = sum(path.stat().st_size for path in folders[1].iterdir())
    assert rows[0][3:] == ["2", "d", "2", "h", "20,480", "0.6000", "-", "complete"]
    newest = f"20 {size_bytes / 1000:.3g} kB 2 h 30 min 40,960 0.3000 0.3125 complete, newest valid"
    assert rows[1] == newest.split()
    assert rows[2][-5:] == ["-", "DAMAGED:", "rank-00001.safetensors", "is", "missing"]
    assert f"unfinished, never read: {tmp_path}/checkpoints/step-00000040.tmp\n" in shown
    assert f"newest valid: {folders[1]}\n" in shown


def test_a_list_without_metrics_has_no_losses_and_all_is_sound(tmp_path, inspect, as_json):
    save(tmp_path / "checkpoints")
    assert inspect(tmp_path)[0] == 0
    (only,) = as_json(tmp_path)["checkpoints"]
    assert (only["loss"], only["validation_loss"], only["valid"]) == (None, None, True)


# One checkpoint


def test_a_page_tells_what_the_files_say(tmp_path, inspect):
    write_rows(tmp_path)
    folder = save(tmp_path / "checkpoints", tp_size=2, dp_size=3, pp_size=3)
    status, shown, _ = inspect(folder)
    assert status == 0
    for line in (
        "ago, after step 20, loss 0.3000, validation loss 0.3125",
        "320 samples, 40,960 tokens, 20 optimizer steps",
        "6 ranks = tensor 2 x pipeline 3 x data 1, sequence parallel; ZeRO-3, fp32",
        f"{random_llama(tiny_run().model).num_parameters():,} parameters: 2 layers of width 32, "
        "4 query and 2 key/value heads, vocabulary 257",
        "train: data/a (weight 0.25), data/b (weight 0.75)",
        "megalite 0.1.0, torch 2.13.0",
    ):
        assert line in shown
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line}
    assert rows["weight"] == rows["exp_avg"] == ["4", "162", "648", "B", "float32"]
    assert rows["buffer"] == ["1", "4", "16", "B", "float32"]
    num_bytes = sum(numbers.nbytes for *_, numbers in raw_pieces(folder))
    assert rows["all"] == ["13", "490", f"{num_bytes / 1000:.3g}", "kB", "float32"]


def test_bytes_are_those_of_the_precision_that_is_stored(tmp_path, as_json):
    narrow = {("weight", "embed"): torch.ones(10, 6, dtype=torch.bfloat16), ("weight", "norm"): torch.ones(6)}
    found = as_json(save(tmp_path, full=narrow))["tensors"]
    assert [(t["name"], t["num_bytes"], t["dtypes"]) for t in found] == [
        ("embed", 120, ["bfloat16"]),
        ("norm", 24, ["float32"]),
    ]


def test_the_numbers_of_each_tensor_are_those_of_the_raw_files(tmp_path, inspect, as_json):
    folder = save(tmp_path / "run" / "checkpoints")
    expected = raw_tensors(folder)
    found = {(t["kind"], t["name"]): t for t in as_json(tmp_path / "run", "--tensors")["tensors"]}
    assert found.keys() == expected.keys() == tensors().keys()
    for key, full in expected.items():
        finite = full[np.isfinite(full)].astype(np.float64)
        facts = found[key]
        assert facts["shape"] == list(full.shape)
        assert facts["norm"] == pytest.approx(np.linalg.norm(finite), rel=1e-13)  # sums in another order
        assert (facts["minimum"], facts["maximum"]) == (finite.min(), finite.max())
        assert facts["num_nonfinite"] == full.size - finite.size
    row = next(line for line in inspect(folder, "--tensors")[1].splitlines() if "bias" in line)
    assert row.split() == ["buffer", "bias", "[4]", "2.236", "-2", "1", "2"]


def test_the_config_is_printed_as_it_is(tmp_path, inspect):
    folder = save(tmp_path)
    assert inspect(tmp_path, "--config") == (0, (folder / "config.yaml").read_text(), "")


# Damage

RANKS = ["rank-00000.safetensors", "rank-00003.safetensors"]
FILES = ["state.json", "config.yaml", "deepspeed.json", "manifest.json", *RANKS]


@pytest.mark.parametrize("where", ["run", "step"])
def test_verify_names_the_file_in_which_a_bit_is_another(tmp_path, inspect, where):
    folder = save(tmp_path / "checkpoints")
    path = tmp_path if where == "run" else folder
    for file in FILES:
        middle = (folder / file).stat().st_size // 2
        flip_a_bit(folder / file, middle)
        status, shown, _ = inspect(path, "--verify")
        flip_a_bit(folder / file, middle)
        (line,) = [line for line in shown.splitlines() if "DAMAGED" in line]
        assert status == 1
        assert file in line and all(other not in line for other in set(FILES) - {file})
    assert inspect(path, "--verify")[0] == 0


def test_every_damaged_file_is_named(tmp_path, as_json):
    folder = save(tmp_path)
    for file in RANKS:
        flip_a_bit(folder / file, -1)
    (folder / "rank-00001.safetensors").unlink()
    flip_a_bit(folder / "deepspeed.json", 4)
    damage = as_json(folder, "--verify")["damage"]
    assert sorted(damage) == [
        "deepspeed.json does not match its sha256",
        "rank-00000.safetensors does not match its sha256",
        "rank-00001.safetensors is missing",
        "rank-00003.safetensors does not match its sha256",
    ]


def test_without_verify_a_flipped_bit_is_not_seen_and_that_is_said(tmp_path, inspect):
    folder = save(tmp_path)
    flip_a_bit(folder / "rank-00000.safetensors", -1)
    status, shown, _ = inspect(folder)
    assert status == 0 and "those of tensors in their sizes; --verify reads them too" in shown
    flip_a_bit(folder / "deepspeed.json", 4)  # texts are small, and always read
    status, shown, _ = inspect(folder)
    assert status == 1 and "DAMAGED: deepspeed.json does not match its sha256" in shown


def test_a_header_that_lost_a_tensor_is_one_line(tmp_path, inspect):
    folder = save(tmp_path)
    path = folder / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes().replace(b',"weight/embed', b',"weight/embad', 1))
    for options in ([], ["--tensors"], ["--compare", folder]):
        status, shown, told = inspect(folder, *options)
        assert (status, shown) == (2, "")
        assert "error: weight embed: weight/embed/" in told and "the file is damaged" in told


def test_of_a_damaged_checkpoint_what_is_left_is_told(tmp_path, inspect):
    folder = save(tmp_path)
    (folder / "rank-00001.safetensors").write_bytes(b"cut off")
    status, shown, _ = inspect(folder, "--tensors")
    assert status == 1
    assert "DAMAGED: rank-00001.safetensors has 7 bytes, " in shown and "320 samples" in shown
    assert ["weight", "4", "162", "-"] in [line.split() for line in shown.splitlines()]


# Two checkpoints


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 4), (2, 3), (4, 2)], ids=str)
def test_checkpoints_of_two_layouts_are_equal(tmp_path, inspect, layout):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", 30, *layout)
    status, shown, _ = inspect(a, "--compare", b)
    assert status == 0
    assert shown.endswith("\nequal bit for bit: 13 tensors, 490 elements\n")
    assert "  step: 20 and 30\n  consumed_tokens: 40960 and 61440\n" in shown
    assert (f"  parallel.tp_size: 2 and {layout[0]}\n" in shown) == (layout[0] != 2)


def test_one_flipped_bit_is_found_and_named(tmp_path, inspect, as_json):
    a, b = save(tmp_path / "a"), save(tmp_path / "b", 20, 4, 2)
    before = raw_tensors(b)
    file, _, first_byte, _ = next(piece for piece in raw_pieces(b) if piece[1][1:3] == ["exp_avg", "row"])
    flip_a_bit(file, first_byte + 3, bit=6)  # the highest of the exponent, little-endian
    after = raw_tensors(b)
    (at,) = np.argwhere(before["exp_avg", "row"].view(np.int32) != after["exp_avg", "row"].view(np.int32))
    x, y = (float(full["exp_avg", "row"][tuple(at)]) for full in (before, after))

    assert inspect(a, "--compare", b)[0] == 1
    found = as_json(a, "--compare", b)
    (difference,) = [tensor for tensor in found["tensors"] if tensor["num_different"]]
    assert (difference["kind"], difference["name"], difference["num_different"]) == ("exp_avg", "row", 1)
    assert difference["place"] == {"at": at.tolist(), "a": x, "b": y}
    assert difference["largest_absolute_difference"] == abs(x - y)
    assert difference["largest_relative_difference"] == abs(x - y) / max(abs(x), abs(y))
    shown = inspect(a, "--compare", b)[1]
    (line,) = [line for line in shown.splitlines() if line.startswith("exp_avg  row")]
    assert "[6, 8]" in line and " 1 of 48 " in line and str(at.tolist()) in line
    assert shown.endswith("\ndifferent: of the tensors 1 with other numbers, 12 equal\n")
    assert inspect(b, "--verify")[0] == 1


def test_what_one_has_not_is_told_by_kind(tmp_path, inspect):
    less = {key: full for key, full in tensors().items() if key[0] == "weight"}
    less["weight", "norm"] = torch.ones(5)
    status, shown, _ = inspect(save(tmp_path / "a"), "--compare", save(tmp_path / "b", full=less))
    assert status == 1
    rows = [line.split() for line in shown.splitlines()]
    assert ["weight", "3", "0", "1", "0", "0", "0", "0"] in rows
    assert ["exp_avg", "0", "0", "0", "4", "0", "0", "0"] in rows
    assert "other shapes:\n  weight norm: [6] and [5]\n" in shown
    assert "only in a:\n  buffer bias\n  exp_avg column\n" in shown
    assert shown.endswith("\ndifferent: of the tensors 1 with another shape, 9 only in a, 3 equal\n")


def test_long_lists_are_cut_unless_all_is_asked_for(tmp_path, inspect):
    pair = save(tmp_path / "a"), "--compare", save(tmp_path / "b", full=tensors(seed=1))
    assert "  and 2 more; --tensors shows all\n" in inspect(*pair)[1]  # the buffer is the same
    assert "more; --tensors" not in inspect(*pair, "--tensors")[1]


def test_a_run_stands_for_its_newest_complete_checkpoint(tmp_path, as_json):
    for step in (10, 20, 30):
        save(tmp_path / "a" / "checkpoints", step)
    (tmp_path / "a/checkpoints/step-00000030/rank-00000.safetensors").unlink()
    b = save(tmp_path / "b", 10)
    found = as_json(tmp_path / "a", "--compare", b)
    assert found["a"].endswith("step-00000020") and found["b"] == str(b) and found["equal"]


# Hugging Face folders


@pytest.mark.parametrize("variant", ["tied", "experts"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_equal_those_that_transformers_saved(tmp_path, monkeypatch, inspect, as_json, variant, dtype):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 333)  # they begin and end in the middle of experts
    monkeypatch.setattr(source, "KEPT_BYTES", 10_000)
    run = tiny_run(variant)
    llama = random_llama(run.model)
    checkpoint = save_llama(tmp_path / "run", llama, run)
    llama.to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf")
    status, shown, _ = inspect(checkpoint, "--compare", tmp_path / "hf")
    assert status == 0, shown
    assert f"equal bit for bit: {len(tensors_of(llama))} tensors" in shown
    with torch.no_grad():
        llama.model.layers[1].self_attn.q_proj.weight[3, 5] += 1
    llama.save_pretrained(tmp_path / "other")
    found = as_json(checkpoint, "--compare", tmp_path / "other")
    (difference,) = [tensor for tensor in found["tensors"] if tensor["num_different"]]
    assert difference["name"] == "model.layers.1.self_attn.q_proj.weight"
    assert difference["place"]["at"] == [3, 5] and not found["equal"]


# Adapters


def test_adapters_are_shown_with_their_base(tmp_path, inspect, as_json):
    tuned = save_tuned(tmp_path)
    sha256 = hashlib.sha256((tuned.base / "manifest.json").read_bytes()).hexdigest()
    status, shown, _ = inspect(tuned.checkpoint, "--verify")
    assert status == 0
    assert f"of {tuned.base}\n" in shown and "as it was when they were trained on it" in shown
    assert sha256 in shown
    assert as_json(tuned.checkpoint)["tensors"][0]["name"].endswith("lora_A.weight")

    flip_a_bit(tuned.base / "rank-00000.safetensors", -1)
    assert inspect(tuned.checkpoint)[0] == 0
    status, shown, _ = inspect(tuned.checkpoint.parent, "--verify")
    assert status == 1 and f"its base {tuned.base}: rank-00000.safetensors does not match" in shown

    shutil.rmtree(tuned.base)
    status, shown, _ = inspect(tuned.checkpoint)
    assert status == 1 and f"the manifest of its base {tuned.base} is absent" in shown
    assert "6 files, " in shown  # its own files are sound
    assert as_json(tuned.checkpoint.parent)["newest_valid"] is None


def test_a_base_of_many_is_read_once(tmp_path, monkeypatch, inspect):
    tuned, read, real = save_tuned(tmp_path), [], damage.hash_file
    later = tuned.checkpoint.with_name("step-00000008")
    state = {"step": 8, BASE: Base.of(tuned.base).record(tmp_path / "tuned")}
    save_world(later.parent, 8, cut_all(tensors(), lambda *_: even_cut(None)), state)
    monkeypatch.setattr(damage, "hash_file", lambda path, *watch: read.append(path) or real(path, *watch))
    assert inspect(later.parent, "--verify")[0] == 0
    folders = [tuned.base, tuned.checkpoint, later]
    assert sorted(read) == sorted(
        file for folder in folders for file in folder.iterdir() if file.name != "manifest.json"
    )


def test_adapters_are_merged_before_they_are_compared_with_a_folder(tmp_path, as_json):
    tuned = save_tuned(tmp_path)
    names = {name for _, name in merged(tuned)}
    tuned.llama.load_state_dict({name: full.float() for (_, name), full in merged(tuned).items()})
    tuned.llama.save_pretrained(tmp_path / "hf")
    found = as_json(tuned.checkpoint, "--compare", tmp_path / "hf")
    assert {tensor["name"] for tensor in found["tensors"]} == names
    # W + scale B A is rounded once here and there, but B A is a sum in float32 here: some units of the last
    # place of numbers up to 2
    assert max(tensor["largest_absolute_difference"] for tensor in found["tensors"]) < 2e-6


# Mistakes


def nothing(folder: Path) -> None:
    folder.mkdir()


def hf_folder(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def damaged_manifest(folder: Path) -> None:
    flip_a_bit(save(folder) / "manifest.json", 100)


def damaged_state(folder: Path) -> None:
    (save(folder) / "state.json").write_text("{" * len((folder / "step-00000020/state.json").read_text()))


def no_manifest(folder: Path) -> None:
    (save(folder) / "manifest.json").unlink()


def bad_metrics(folder: Path) -> None:
    save(folder / "checkpoints")
    (folder / "metrics.jsonl").write_text("not a row\n")


STEP = "step-00000020"


@pytest.mark.parametrize(
    ("make", "where", "line"),
    [
        (nothing, "", "no checkpoint in {}: expected RUN_DIR/checkpoints, RUN_DIR or one step's folder"),
        (nothing, STEP, "there is no checkpoint {}"),
        (nothing, "absent", "no checkpoint in {}: expected "),
        (hf_folder, "", "{} is a Hugging Face folder: "),
        (damaged_manifest, STEP, "{} is not a valid checkpoint: {}/manifest.json "),
        (damaged_state, STEP, "{} is not a valid checkpoint: state.json does not match its sha256"),
        (no_manifest, STEP, "{} is not a valid checkpoint: {}/manifest.json is missing: "),
        (bad_metrics, "", "{}/metrics.jsonl, line 1: not a row of metrics: remove the line"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, inspect, make, where, line):
    make(tmp_path / "made")
    path = tmp_path / "made" / where
    status, shown, told = inspect(path)
    assert (status, shown) == (2, "")
    assert told.startswith("error: " + line.replace("{}", str(path))) and told.count("\n") == 1


@pytest.mark.parametrize("options", [(), ("--tensors",), ("--config",)])
def test_a_run_whose_checkpoints_are_all_damaged(tmp_path, inspect, options):
    damaged_manifest(tmp_path)
    status, _, told = inspect(tmp_path, *options)
    assert status == (2 if options else 1)
    assert told.startswith(f"error: no valid checkpoint in {tmp_path}: {STEP}: ") or not options


def test_different_models_are_not_compared(tmp_path, inspect):
    other = {("weight", "w"): torch.ones(3), ("weight", "norm"): torch.ones(7)}
    root = tmp_path / "b"
    b = save_world(root, 1, cut_all(other, lambda *_: even_cut(None)))
    a = save(tmp_path / "a")
    status, shown, told = inspect(a, "--compare", b)
    assert (status, shown) == (2, "")
    expected = (
        f"{a} has 13 tensors and {b} 2, none of one kind, name and shape: compare checkpoints of one model"
    )
    assert told == f"error: {expected}\n"


@pytest.mark.parametrize(
    "options", [["--compare", "x", "--verify"], ["--compare", "x", "--config"], ["--config", "--json"]]
)
def test_options_that_do_not_go_together(tmp_path, capsys, options):
    with pytest.raises(SystemExit, match="2"):
        inspect_checkpoint.main([str(tmp_path), *options])
    assert "error: --" in capsys.readouterr().err
