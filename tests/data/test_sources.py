import bz2
import gzip
import json
import pickle

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data import sources
from megalite.data.error import DataError
from megalite.data.sources import find_source

MIB = 1 << 20
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}


def read(name, keys=("text",), max_bytes=MIB, **options):
    """A source: texts of the first key, (number, reason) of bad records, number of records."""
    source = find_source(str(name), keys, **options)
    texts, bad, count, num_bytes = [], [], 0, 0
    for block in source.blocks(max_bytes):
        found = pickle.loads(pickle.dumps(block)).read(keys, max_bytes)  # as a worker gets it
        texts += found.texts[0]
        bad += [(count + record, reason) for record, reason in found.bad_records]
        count += found.num_records
        num_bytes += block.num_bytes
    assert source.num_bytes in (None, num_bytes) or abs(num_bytes - source.num_bytes) < 100
    return texts, bad, count


def lines_of(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def small_blocks(monkeypatch, num_bytes=64):
    monkeypatch.setattr(sources, "BLOCK_BYTES", num_bytes)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=12), max_size=12),
    block_bytes=st.integers(1, 80),
    last_newline=st.booleans(),
    windows=st.booleans(),
    packed=st.sampled_from(["", ".gz"]),
)
def test_blocks_of_any_size_give_every_line_once_and_in_order(
    tmp_path_factory, texts, block_bytes, last_newline, windows, packed
):
    path = tmp_path_factory.mktemp("d") / f"x.jsonl{packed}"
    newline = b"\r\n" if windows else b"\n"
    kept = [text for text in texts if text.isprintable()]
    lines = newline.join(json.dumps({"text": text}, ensure_ascii=False).encode() for text in kept)
    path.write_bytes(PACK[packed](lines + newline * last_newline))
    with pytest.MonkeyPatch.context() as patch:
        small_blocks(patch, block_bytes)
        found, bad, count = read(path)
    assert (found, bad, count) == (kept, [], len((lines + newline * last_newline).splitlines()))


@pytest.mark.parametrize("ending", PACK)
def test_compressed_lines_and_text_are_read_as_plain_ones(tmp_path, ending, monkeypatch):
    small_blocks(monkeypatch)
    content = lines_of(*({"text": f"número {i}"} for i in range(50)), {"body": 1}, {"text": "last"})
    (tmp_path / f"x.jsonl{ending}").write_bytes(PACK[ending](content[:1000]) + PACK[ending](content[1000:]))
    texts, [(line, reason)], _ = read(tmp_path / f"x.jsonl{ending}")
    assert texts == [*(f"número {i}" for i in range(50)), "last"] and line == 51 and "no key 'text'" in reason
    (tmp_path / f"x.txt{ending}").write_bytes(PACK[ending]("\ufefftwo\nlínes".encode()))
    assert read(tmp_path / f"x.txt{ending}") == (["two\nlínes"], [], 1)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"body": "x", "id": 3}', "no key 'text'; keys are 'body', 'id'"),
        (b"{}", "keys are none"),
        (b'{"text": null}', "key 'text': expected text, found NoneType"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b'{"text": "a\\ud800"}', "half a surrogate pair at character 1"),
        (b'{"text": "' + b"x" * 300_000 + b'"}', "more than 200,000 bytes"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "not JSON"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_bad_line_is_reported_and_left_out(tmp_path, line, reason, ending, monkeypatch):
    small_blocks(monkeypatch, 10)
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(PACK[ending](b'\xef\xbb\xbf{"text": "a"}\n\n' + line + b'\n{"text": ""}\n'))
    texts, [(number, why)], count = read(path, max_bytes=200_000)
    assert (texts, number, count) == (["a", ""], 3, 4) and reason in why and len(why) < 300


def test_a_line_as_long_as_allowed_is_read(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines_of({"text": "x" * 100}))
    assert read(tmp_path / "x.jsonl", max_bytes=113)[0] == ["x" * 100]
    assert read(tmp_path / "x.jsonl", max_bytes=112)[1] != []


def test_a_text_file_that_is_long_or_not_text_is_left_out(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"ab\xff")
    assert read(tmp_path / "x.txt") == ([], [(1, "not UTF-8 at byte 2")], 1)
    (tmp_path / "x.txt").write_bytes(b"abcd")
    assert "more than 3 bytes" in read(tmp_path / "x.txt", max_bytes=3)[1][0][1]


def test_several_keys_stay_side_by_side(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(lines_of({"a": "1", "b": "2"}, {"a": "3"}, {"a": "4", "b": "5"}))
    [block] = find_source(str(tmp_path / "x.jsonl"), ("a", "b")).blocks(MIB)
    found = block.read(("a", "b"), MIB)
    assert found.texts == [["1", "4"], ["2", "5"]] and found.numbers == [1, 3] and len(found.bad_records) == 1


def write_parquet(path, texts, kind=None, **options):
    table = pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, kind)})
    pyarrow.parquet.write_table(table, path, **options)
    return path


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_parquet_rows_are_documents(tmp_path, kind, monkeypatch):
    small_blocks(monkeypatch)
    texts = [f"row {i} é" * (i % 9) for i in range(300)]
    path = write_parquet(tmp_path / "x.parquet", [*texts, None, "x" * 500], kind, row_group_size=70)
    found, bad, count = read(path, max_bytes=400)
    assert found == texts and [record for record, _ in bad] == [301, 302] and count == 302
    encoded = write_parquet(tmp_path / "y.parquet", texts, pyarrow.dictionary(pyarrow.int32(), kind))
    assert read(encoded)[0] == texts


def test_parquet_text_that_is_not_utf8_is_a_bad_row(tmp_path):
    column = pyarrow.array([b"ok", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == (["ok"], [(2, "not UTF-8 at byte 0")], 2)


def test_a_folder_is_read_by_the_datasets_library(tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "raw").mkdir()
    for split, texts in (("train", ["a", "b"]), ("validation", ["c"])):
        (tmp_path / "raw" / f"{split}.jsonl").write_bytes(lines_of(*({"text": text} for text in texts)))
    assert read(tmp_path / "raw")[0] == ["a", "b"]
    assert read(tmp_path / "raw", split="validation")[0] == ["c"]
    datasets.Dataset.from_dict({"text": ["x", None, "z"]}).save_to_disk(str(tmp_path / "saved"))
    parts = {"train": datasets.Dataset.from_dict({"text": ["p"]})}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "parts"))
    assert read(tmp_path / "parts")[0] == ["p"]
    (tmp_path / "raw" / "train.jsonl").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="raw: dataset: expected to read it, found"):
        read(tmp_path / "raw")
    texts, [(row, reason)], _ = read(tmp_path / "saved")
    assert (texts, row, reason) == (["x", "z"], 2, "key 'text': expected text, found nothing")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no.jsonl", {}, "no.jsonl: input: expected a file or a folder, found nothing: .* hf:NAME"),
        ("x.zip", {}, "expected JSON lines, Parquet or text, found .zip"),
        ("x.tar.gz", {}, "expected JSON lines, Parquet or text, found .tar"),
        ("empty", {}, "empty: dataset: expected to read it, found"),
        ("hf:nobody/nothing", {}, "hf:nobody/nothing: dataset: expected to read it, found"),
        ("raw", {"split": "test"}, "raw: dataset: expected to read it, found: .*test"),
        ("raw", {"keys": ("body",)}, "raw: no column 'body'; columns are 'text'"),
        ("x.parquet", {"keys": ("body",)}, "x.parquet: no column 'body'; columns are 'id', 'text'"),
        ("x.parquet", {"keys": ("id",)}, "x.parquet: column 'id': expected text, found int64"),
        ("bad.parquet", {}, "bad.parquet: Parquet: expected to read it, found"),
        ("cut.jsonl.gz", {}, "cut.jsonl.gz: gzip data: expected it whole, found: Truncated"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch, name, options, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "raw"):
        (tmp_path / folder).mkdir()
    (tmp_path / "raw" / "train.jsonl").write_bytes(lines_of({"text": "a"}))
    for file in ("x.zip", "x.tar.gz"):
        (tmp_path / file).touch()
    write_parquet(tmp_path / "x.parquet", ["a"])
    (tmp_path / "bad.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-9])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines_of({"text": "a" * 99}))[:-9])
    with pytest.raises(DataError, match=message) as caught:
        read(name, **options)
    assert "\n" not in str(caught.value)
