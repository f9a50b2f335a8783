import json
import multiprocessing
import os
import shutil
import signal
import time
import warnings

import numpy as np
import pytest

from megalite.data import cache as cache_module
from megalite.data.cache import MANIFEST, IndexCache
from megalite.data.gpt_dataset import GPTDataset
from megalite.data.indexed_dataset import IndexedDataset, bin_path, idx_path

MADE_FROM = {"kind": "test", "seed": 1}
FORK = multiprocessing.get_context("fork")


def build():
    """Arrays of several shapes, one of them empty."""
    return {
        "wide": np.arange(6, dtype=np.int64).reshape(3, 2),
        "none": np.empty((0, 2), np.int32),
        "short": np.array([7, 8, 9], np.uint32),
    }


def never():
    raise AssertionError("built, though the entry is there")


def assert_right(arrays):
    expected = build()
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        assert array.dtype == expected[name].dtype and np.array_equal(array, expected[name])


def entry_of(folder):
    [entry] = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return entry


@pytest.fixture
def filled(tmp_path):
    """A cache folder with one entry."""
    assert_right(IndexCache(tmp_path / "cache").get(MADE_FROM, build))
    return tmp_path / "cache"


def test_what_was_built_is_found_again_mapped_and_counted(filled):
    cache = IndexCache(filled)
    arrays = cache.get(MADE_FROM, never)
    assert_right(arrays)
    assert not arrays["wide"].flags.owndata and not arrays["wide"].flags.writeable
    assert (cache.num_found, cache.num_built, cache.num_kept) == (1, 0, 0)
    cache.get({**MADE_FROM, "seed": 2}, build)
    assert (cache.num_found, cache.num_built, cache.num_kept) == (1, 1, 1)


def test_an_entry_is_on_the_disk_with_all_its_files(synced, filled):
    entry = entry_of(filled)
    assert {path.stat().st_ino for path in (*entry.iterdir(), entry, filled)} <= synced


def test_mapped_arrays_outlive_the_entry(filled):
    arrays = IndexCache(filled).get(MADE_FROM, never)
    shutil.rmtree(filled)
    assert_right(arrays)


def damages(entry):
    """Every file cut, emptied, extended, removed, and changed in each of many bytes."""
    for path in sorted(entry.iterdir()):
        whole = path.read_bytes()
        yield path, None
        yield path, whole + b"\0"
        if whole:
            yield path, b""
            yield path, whole[:-1]
        for place in range(0, len(whole), 5):
            yield path, whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :]


def test_whatever_is_damaged_is_built_again_with_a_warning(filled):
    entry, count = entry_of(filled), 0
    for path, content in list(damages(entry)):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.warns(UserWarning, match="index cache: expected an intact entry, found: .*: built again"):
            assert_right(IndexCache(filled).get(MADE_FROM, build))
        assert_right(IndexCache(filled).get(MADE_FROM, never))
        count += 1
    assert count > 100 and list(filled.iterdir()) == [entry]


def test_an_entry_of_other_data_under_this_name_is_not_believed(filled):
    entry = entry_of(filled)
    IndexCache(filled).get({**MADE_FROM, "seed": 2}, lambda: {"wide": np.zeros(6, np.int64)})
    other = next(path for path in filled.iterdir() if path != entry)
    shutil.rmtree(entry)
    other.rename(entry)
    with pytest.warns(UserWarning, match="describes other data: built again"):
        assert_right(IndexCache(filled).get(MADE_FROM, build))


def test_a_folder_that_cannot_be_written_keeps_nothing_and_harms_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = IndexCache(tmp_path / "file")
    with pytest.warns(UserWarning, match="file: index cache: .*: the index is kept in memory only"):
        assert_right(cache.get(MADE_FROM, build))
    assert (cache.num_built, cache.num_kept) == (1, 0)


def test_a_full_disk_leaves_no_entry(tmp_path, monkeypatch):
    def full(path, data):
        if path.name == MANIFEST:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(cache_module, "_write_file", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert_right(IndexCache(tmp_path).get(MADE_FROM, build))
    assert list(tmp_path.iterdir()) == []


def slowly():
    time.sleep(0.05)
    return build()


def race(folder, start, results, dies):
    """One of several builders; one that dies does so with its first file written and the others to come."""
    warnings.simplefilter("error")
    if dies:
        write_file = cache_module._write_file

        def write_one_and_die(path, data):
            write_file(path, data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        cache_module._write_file = write_one_and_die
    start.wait()
    cache = IndexCache(folder)
    assert_right(cache.get(MADE_FROM, slowly))
    results.put((cache.num_found, cache.num_built, cache.num_kept))


def run_race(folder, dying):
    """Start builders at the same moment; returns exit codes, and what each survivor counted."""
    start, results = FORK.Barrier(len(dying)), FORK.SimpleQueue()
    builders = [FORK.Process(target=race, args=(folder, start, results, dies)) for dies in dying]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    codes = [builder.exitcode for builder in builders]
    return codes, [results.get() for code in codes if code == 0]


@pytest.mark.parametrize("attempt", range(3))
def test_builders_that_race_all_get_the_right_arrays(tmp_path, attempt):
    codes, counts = run_race(tmp_path, [False, False, False])
    assert codes == [0, 0, 0] and counts == [(0, 1, 1)] * 3  # they did overlap
    assert list(tmp_path.iterdir()) == [entry_of(tmp_path)]
    assert_right(IndexCache(tmp_path).get(MADE_FROM, never))


def test_a_builder_killed_midway_does_not_matter_to_another(tmp_path):
    codes, counts = run_race(tmp_path, [True, False])
    assert codes == [-signal.SIGKILL, 0] and counts == [(0, 1, 1)]
    assert_right(IndexCache(tmp_path).get(MADE_FROM, never))


def test_a_builder_killed_midway_leaves_nothing_that_is_believed(tmp_path):
    codes, _ = run_race(tmp_path, [True])
    assert codes == [-signal.SIGKILL]
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".") and left.name.endswith(".tmp")
    cache = IndexCache(tmp_path)
    assert_right(cache.get(MADE_FROM, build))
    assert cache.num_built == 1


def test_racers_mend_a_damaged_entry_together(filled):
    (entry_of(filled) / "wide.raw").write_bytes(b"damaged")

    def mend(results):
        warnings.simplefilter("ignore")
        assert_right(IndexCache(filled).get(MADE_FROM, slowly))
        results.put(True)

    results = FORK.SimpleQueue()
    builders = [FORK.Process(target=mend, args=(results,)) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert [builder.exitcode for builder in builders] == [0, 0, 0]
    assert_right(IndexCache(filled).get(MADE_FROM, never))


def sample_dataset(prefix, folder, **changes):
    arguments = {"seq_length": 3, "num_samples": 9, "seed": 5, "bounds": (0, 3), **changes}
    cache = IndexCache(folder)
    return GPTDataset(IndexedDataset(prefix), **arguments, cache=cache), cache


def test_a_dataset_from_the_cache_is_the_dataset_built_afresh(golden, tmp_path):
    fresh = GPTDataset(golden, 3, 9, 5)
    for found in (0, 1):
        kept, cache = sample_dataset(golden.prefix, tmp_path / "cache")
        assert cache.num_found == found
        assert [kept[i].tolist() for i in range(len(kept))] == [fresh[i].tolist() for i in range(len(fresh))]
        assert [array.dtype for array in kept.index] == [array.dtype for array in fresh.index]


def test_data_and_cache_may_move(golden, tmp_path):
    sample_dataset(golden.prefix, tmp_path / "cache")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in (bin_path, idx_path):
        path(golden.prefix).rename(path(elsewhere / "renamed"))
    (tmp_path / "cache").rename(elsewhere / "cache")
    assert sample_dataset(elsewhere / "renamed", elsewhere / "cache")[1].num_found == 1


@pytest.mark.parametrize(
    "changes", [{"seq_length": 2}, {"num_samples": 30}, {"seed": 6}, {"bounds": (1, 3)}], ids=str
)
def test_another_dataset_does_not_find_this_entry(golden, tmp_path, changes):
    sample_dataset(golden.prefix, tmp_path / "cache")
    assert sample_dataset(golden.prefix, tmp_path / "cache", **changes)[1].num_found == 0


def test_other_content_under_the_same_name_does_not_find_this_entry(golden, write_dataset, tmp_path):
    sample_dataset(golden.prefix, tmp_path / "cache")
    write_dataset([[1, 2, 3], [4, 5, 0, 0], [6, 0]])  # as many tokens and sequences
    kept, cache = sample_dataset(golden.prefix, tmp_path / "cache")
    assert (
        cache.num_found == 0
        and kept[0].tolist() == GPTDataset(IndexedDataset(golden.prefix), 3, 9, 5)[0].tolist()
    )


def test_a_longer_run_within_the_same_epochs_finds_this_entry(golden, tmp_path):
    sample_dataset(golden.prefix, tmp_path / "cache", num_samples=7)
    assert sample_dataset(golden.prefix, tmp_path / "cache", num_samples=8)[1].num_found == 1


def test_the_manifest_can_be_read_by_people(filled):
    manifest = json.loads((entry_of(filled) / MANIFEST).read_text())
    assert manifest["made_from"] == {"version": cache_module.VERSION, **MADE_FROM}
    assert manifest["arrays"]["wide"]["shape"] == [3, 2] and manifest["arrays"]["wide"]["dtype"] == "<i8"
