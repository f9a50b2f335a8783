"""More than a thousand damaged inputs: each ends in a clear line or a counted record, never in wrong data.

A case is (name, content of the damaged file). What a case must show is stated once for each family.
"""

import bz2
import gzip
import json
import random
import struct

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megalite.data.error import DataError
from megalite.data.foreign import Boundaries, check_pieces, read_datatrove, read_flat, read_llmc
from megalite.data.indexed_dataset import HEADER, MAGIC, IndexedDataset
from megalite.data.indexed_writer import INT32, UINT16, IndexedDatasetWriter
from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.load import build_byte_tokenizer, load_tokenizer
from tools import inspect_data, preprocess_data

VOCAB_SIZE = 65_000
TEXTS = [f"document {number} é" * (number % 4) for number in range(12)]


def truncated(content, step=1):
    return [(f"cut at {size}", content[:size]) for size in range(0, len(content), step)]


def flipped(content, number, start=0, stop=None, seed=0):
    """One bit of one byte changed, at random places of a range."""
    draw, cases = random.Random(seed), []
    for _ in range(number):
        place, bit = draw.randrange(start, stop or len(content)), draw.randrange(8)
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        cases.append((f"bit {bit} of byte {place}", bytes(damaged)))
    return cases


def one_line(error, path):
    """An error a person can use: it names the file, in one line."""
    assert "\n" not in str(error) and str(path) in str(error), error


# ---- P.idx and P.bin


def index_of(lengths, boundaries, code=8, itemsize=2, **counts):
    """A whole index file; `counts` may lie."""
    pointers = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * itemsize
    numbers = (counts.get("num_sequences", len(lengths)), counts.get("num_boundaries", len(boundaries)))
    arrays = (np.array(lengths, "<i4"), pointers.astype("<i8"), np.array(boundaries, "<i8"))
    return HEADER.pack(MAGIC, 1, code, *numbers) + b"".join(array.tobytes() for array in arrays)


LENGTHS, BOUNDARIES = [3, 2, 4, 1], [0, 2, 2, 3, 4]
INDEX = index_of(LENGTHS, BOUNDARIES)
IDS = np.array([1, 64_999, 3, 40_000, 5, 6, 7, 50_000, 9, 10], "<u2")  # as i16 some are negative
BOUNDARY_BYTES = 8 * len(BOUNDARIES)


def index_cases():
    odd = [2**16, 2**31, 2**32, 2**61, 2**63, 2**64 - 1]
    cases = truncated(INDEX)
    cases += flipped(INDEX, 200, 0, HEADER.size) + flipped(INDEX, 300, HEADER.size, seed=1)
    cases += [(f"dtype {code}", index_of(LENGTHS, BOUNDARIES, code)) for code in range(256) if code != 8]
    cases += [(f"S {size}", index_of(LENGTHS, BOUNDARIES, num_sequences=size)) for size in [0, 3, 5, *odd]]
    cases += [(f"D {size}", index_of(LENGTHS, BOUNDARIES, num_boundaries=size)) for size in [0, 4, 6, *odd]]
    for row in range(4):
        for length in (-1, -(2**31), 2**31 - 1):
            lengths = [*LENGTHS[:row], length, *LENGTHS[row + 1 :]]
            cases.append((f"length {row} is {length}", index_of(lengths, BOUNDARIES)))
    for boundaries in ([1, 2, 4], [0, 3, 2, 4], [0, -1, 4], [0, 5], [0, 2**62, 4], [0, 2**63 - 1]):
        cases.append((f"boundaries {boundaries}", index_of(LENGTHS, boundaries)))
    swapped = [
        ("ids", IDS.tobytes()),
        ("another", index_of([9, 2], [0, 1, 2])),
        ("multimodal", INDEX + bytes(4)),
    ]
    return [*cases, *swapped, *[(f"{size} more bytes", INDEX + bytes(size)) for size in (1, 2, 8, 100)]]


def bin_cases():
    content = IDS.tobytes()
    return [*truncated(content), ("longer", content + b"\0"), ("twice", content * 2), ("index", INDEX)]


def check_pair(tmp_path, capsys):
    """The pair is refused on opening or by verification, or holds the very same sequences."""
    prefix = tmp_path / "data"
    try:
        dataset = IndexedDataset(prefix)
    except DataError as error:
        one_line(error, prefix)
        return "refused"
    same = dataset.sequence_lengths.tolist() == LENGTHS and np.array_equal(dataset.tokens[:], IDS)
    status = inspect_data.main([str(prefix), "--verify", "--vocab-size", str(VOCAB_SIZE)])
    assert status == (0 if same else 2)
    one_line(capsys.readouterr().err.splitlines()[-1] if status else str(prefix), prefix)
    return "same" if same else "refused"


def test_a_damaged_pair_is_refused_or_holds_the_same_sequences(tmp_path, capsys):
    (tmp_path / "data.bin").write_bytes(IDS.tobytes())
    outcomes = {}
    for name, content in index_cases():
        (tmp_path / "data.idx").write_bytes(content)
        outcomes[name] = check_pair(tmp_path, capsys)
    same = [name for name, outcome in outcomes.items() if outcome == "same"]
    # All that may pass: an interior document boundary that is moved to another possible place.
    assert all(int(name.split()[-1]) >= len(INDEX) - BOUNDARY_BYTES for name in same), same
    (tmp_path / "data.idx").write_bytes(INDEX)
    for _, content in bin_cases():
        (tmp_path / "data.bin").write_bytes(content)
        assert check_pair(tmp_path, capsys) == "refused"
    (tmp_path / "data.bin").write_bytes(IDS.tobytes())
    assert check_pair(tmp_path, capsys) == "same"  # the control


# ---- text


LINES = [json.dumps({"text": text, "id": 1}, ensure_ascii=False).encode() + b"\n" for text in TEXTS]
BAD_LINES = [
    b"{", b"}", b"[]", b"[1, 2]", b"3", b"null", b"true", b'"text"', b'"\\ud800"', b"{}", b'{"body": "x"}',
    b'{"text": 3}', b'{"text": null}', b'{"text": ["x"]}', b'{"text": {"text": "x"}}', b'{"text": true}',
    b'{"text": "\\ud800"}', b'{"text": "\xff"}', b'{"text": "\xc3"}', b'{"text": "\xed\xa0\x80"}',  b"\xff",
    b'{"text": "x"', b'{"text": "x}', b"{'text': 'x'}", b'{"text": "x"} {"text": "y"}', b"[" * 50_000,
    b'{"a":' * 50_000, b'{"text": "\x00"}', b'{"text": "a\tb"}', b"9" * 5000, b"\x00" * 100, b"nonsense",
    b'{"Text": "x"}', b'{"text ": "x"}', b'"text": "x"', b"<html>", b"text,id", b"\xe2\x80\xa8",
]  # fmt: skip


def line_cases():
    """(name, content, lines that may be lost)."""
    cases = []
    for number, line in enumerate(BAD_LINES):
        place = number % len(LINES)
        cases.append((f"line {line[:20]!r}", b"".join([*LINES[:place], line, b"\n", *LINES[place:]]), 1))
    content = b"".join(LINES)
    cases += [(name, damaged, 2) for name, damaged in flipped(content, 250)]
    return cases + [(name, damaged, 12) for name, damaged in truncated(content, 3)]


def preprocess(tmp_path, capsys, path, max_bad=100):
    """(documents, bad records, error) of a run; a refused run leaves nothing."""
    prefix = tmp_path / "out" / "p"
    arguments = ["--input", str(path), "--output-prefix", str(prefix), "--tokenizer", "bytes"]
    status = preprocess_data.main([*arguments, "--workers", "0", "--max-bad-records", str(max_bad)])
    shown = capsys.readouterr().err.splitlines()
    if status == 2:
        assert list((tmp_path / "out").glob("*")) == []
        [error] = [line for line in shown if line.startswith("error: ")]
        return [], 0, error
    [*counted] = [int(line.split()[2]) for line in shown if line.startswith("left out ")]
    dataset = IndexedDataset(f"{prefix}_text_document")
    found = [bytes(dataset.document(d).astype("u1")).decode() for d in range(dataset.num_documents)]
    for ending in ("bin", "idx"):
        (tmp_path / "out" / f"p_text_document.{ending}").unlink()
    return found, sum(counted), None


def test_a_damaged_line_is_counted_and_costs_no_other(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    for name, content, lost in line_cases():
        path.write_bytes(content)
        found, bad, error = preprocess(tmp_path, capsys, path)
        if error is not None:
            assert "no tokens" in error and len(content) < 100, name
            continue
        assert len(found) + bad == sum(bool(line.strip()) for line in content.split(b"\n")), name
        assert sum(text in found for text in TEXTS) >= len(TEXTS) - lost, name
    path.write_bytes(b"".join(LINES))
    assert preprocess(tmp_path, capsys, path) == (TEXTS, 0, None)  # the control


@pytest.mark.parametrize("number", range(len(BAD_LINES)))
def test_a_bad_line_stops_a_run_that_allows_none_and_is_shown(tmp_path, capsys, number):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join([*LINES[:5], BAD_LINES[number], b"\n", *LINES[5:]]))
    _, _, error = preprocess(tmp_path, capsys, path, max_bad=0)
    assert error is not None and f"{path} line 6: " in error and len(error) < 500


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_line_of_100_megabytes_is_counted(tmp_path, capsys, ending):
    path = tmp_path / f"x.jsonl{ending}"
    with gzip.open(path, "wb", 1) if ending else path.open("wb") as file:
        file.writelines(LINES[:6])
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n')
        file.writelines(LINES[6:])
    assert preprocess(tmp_path, capsys, path) == (TEXTS, 1, None)


def test_text_files_that_are_not_text_are_counted(tmp_path, capsys):
    good = write(tmp_path / "good.txt", b"good")
    for content in (b"\xff", b"caf\xe9", "text".encode("utf-16"), b"\x80abc", b"\xed\xa0\x80", b"abc\xc3"):
        path = write(tmp_path / "x.txt", content)
        _, _, error = preprocess(tmp_path, capsys, path, max_bad=0)
        assert error is not None and f"{path} document 1: not UTF-8 at byte" in error
        assert preprocess(tmp_path, capsys, good) == (["good"], 0, None)


def write(path, content):
    path.write_bytes(content)
    return path


# ---- compressed and columnar


def parquet_content(path):
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, path, row_group_size=5, write_page_checksum=True)
    return path.read_bytes()


def packed_cases(tmp_path):
    content = b"".join(LINES) * 3
    packed = {
        "x.jsonl.gz": gzip.compress(content, mtime=0),
        "x.jsonl.zst": pyarrow.compress(content, "zstd", asbytes=True),
        "x.jsonl.bz2": bz2.compress(content),
        "x.parquet": parquet_content(tmp_path / "x.parquet"),
    }
    for name, whole in packed.items():
        yield from ((name, case, damaged) for case, damaged in truncated(whole, max(1, len(whole) // 40)))
        if name != "x.jsonl.zst":  # frames without a checksum: nothing in the file tells
            yield from ((name, case, damaged) for case, damaged in flipped(whole, 60))
    yield from (("x.jsonl.gz", "not gzip", b"nonsense"), ("x.parquet", "not Parquet", b"PAR1nonsensePAR1"))


def test_damaged_archives_and_tables_are_refused_or_give_the_same(tmp_path, capsys):
    outcomes = []
    for name, case, content in packed_cases(tmp_path):
        path = write(tmp_path / name, content)
        found, bad, error = preprocess(tmp_path, capsys, path)
        outcomes.append(error is not None)
        if error is None:
            assert (found, bad) == (TEXTS * (1 if name == "x.parquet" else 3), 0), (name, case)
        else:
            assert name in error or "no tokens" in error, (name, case)
    assert sum(outcomes) > 0.8 * len(outcomes)


# ---- tokenizers


def tokenizer_cases(tmp_path):
    build_byte_tokenizer().save(tmp_path / "tokenizer")
    content = (tmp_path / "tokenizer" / "tokenizer.json").read_bytes()
    settings = (tmp_path / "tokenizer" / "tokenizer_config.json").read_bytes()
    odd = [b"", b"[]", b"null", b"3", b'{"version": "1.0"}', b"\xff\xfe", b"[" * 50_000, b'{"eos_token": 3}']
    for name, whole in (("tokenizer.json", content), ("tokenizer_config.json", settings)):
        yield from ((name, case) for _, case in truncated(whole, max(1, len(whole) // 30)))
        yield from ((name, case) for _, case in flipped(whole, 50))
        yield from ((name, case) for case in odd)


def test_a_damaged_tokenizer_is_refused_or_is_one(tmp_path):
    whole = {}
    for name, content in tokenizer_cases(tmp_path):
        path = tmp_path / "tokenizer" / name
        whole.setdefault(name, path.read_bytes())
        path.write_bytes(content)
        try:
            tokenizer = load_tokenizer(tmp_path / "tokenizer")
            assert max(tokenizer.encode("ab \n"), default=0) < tokenizer.vocab_size
        except TokenizerError as error:
            one_line(error, tmp_path / "tokenizer")
        path.write_bytes(whole[name])
    assert load_tokenizer(tmp_path / "tokenizer").encode("ab") == [97, 98]  # the control


# ---- files of other projects

PARTS = [[1, 2, 9], [3, 9], [4, 5, 6, 9]]


def foreign_files(tmp_path):
    ids = np.array([token for part in PARTS for token in part], "<u2").tobytes()
    header = struct.pack("<3i", 20240520, 1, 9) + bytes(1012)
    write(tmp_path / "x.ds", ids)
    write(tmp_path / "x.ds.index", np.cumsum([len(part) for part in PARTS]).astype("<u8").tobytes())
    write(tmp_path / "x.ds.metadata", b"gpt2|2\n9")
    return {"x.bin": ids, "x.llmc": header + ids} | {
        name: (tmp_path / name).read_bytes() for name in ("x.ds", "x.ds.index", "x.ds.metadata")
    }


def read_foreign(tmp_path, name):
    path, ends = tmp_path / name.removesuffix(".index").removesuffix(".metadata"), Boundaries("end", 9)
    if name == "x.bin":
        pieces = read_flat(path, np.dtype("<u2"), ends)
    else:
        pieces = read_llmc(path, ends) if name == "x.llmc" else read_datatrove(path, None)
    parts = [
        part.tolist()
        for tokens, lengths in check_pieces(path, pieces, 10)
        for part in np.split(np.asarray(tokens), np.cumsum(lengths)[:-1])
    ]
    return [token for part in parts for token in part], parts


def foreign_cases(tmp_path):
    for name, whole in foreign_files(tmp_path).items():
        step = max(1, len(whole) // 60)
        yield from ((name, "cut", case) for _, case in truncated(whole, step))
        yield from (
            (name, "flip", case) for _, case in flipped(whole, 40, 0, 12 if name == "x.llmc" else None)
        )
        yield from ((name, "swap", other) for other in (INDEX, gzip.compress(whole), b"\x93NUMPY" + whole))


def test_damaged_files_of_other_projects_are_refused_or_give_the_same_ids(tmp_path):
    whole = foreign_files(tmp_path)
    for name, content in whole.items():
        write(tmp_path / name, content)
    expected = [token for part in PARTS for token in part]
    for name, kind, content in foreign_cases(tmp_path):
        write(tmp_path / name, content)
        try:
            ids, parts = read_foreign(tmp_path, name)
        except DataError as error:
            one_line(error, tmp_path / "x.")
        else:
            # Raw ids tell nothing of themselves: whole ids may be missing at the end, or be others below 10.
            raw = name == "x.bin" or (name == "x.ds" and kind == "flip")
            assert raw or (ids, name != "x.ds.index") == (expected, parts == PARTS), (name, kind)
        write(tmp_path / name, whole[name])
    for name in whole:
        assert read_foreign(tmp_path, name)[1] == PARTS  # the control


def test_there_are_more_than_a_thousand_cases(tmp_path):
    families = [index_cases(), bin_cases(), line_cases(), BAD_LINES, packed_cases(tmp_path)]
    families += [tokenizer_cases(tmp_path), foreign_cases(tmp_path)]
    sizes = [len(list(family)) for family in families]
    assert sum(sizes) > 2000, sizes


def test_a_writer_refuses_what_would_not_be_read_again(tmp_path):
    for dtype, ids in ((UINT16, [65_536]), (UINT16, [-1]), (INT32, [2**31]), (INT32, [1.5])):
        with pytest.raises(DataError), IndexedDatasetWriter(tmp_path / "data", dtype) as writer:
            writer.add_document([ids])
    assert list(tmp_path.iterdir()) == []
