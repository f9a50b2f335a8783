import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.documents import check_files, encode_documents, read_documents, split_files
from megalite.data.error import DataError


class Letters:
    """a is 0, b is 1, ...; the end of text is 26."""

    vocab_size, eos_token_id = 27, 26

    def encode_batch(self, texts):
        return [[ord(letter) - ord("a") for letter in text] for text in texts]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(max_size=12), max_size=12),
    chunk_bytes=st.integers(1, 80),
    last_newline=st.booleans(),
    windows=st.booleans(),
)
def test_chunks_of_any_size_give_every_line_once_and_in_order(
    tmp_path_factory, texts, chunk_bytes, last_newline, windows
):
    path = tmp_path_factory.mktemp("d") / "x.jsonl"
    newline = "\r\n" if windows else "\n"
    lines = newline.join(
        json.dumps({"text": text}, ensure_ascii=False) for text in texts if text.isprintable()
    )
    path.write_bytes((lines + newline * last_newline).encode("utf-8", "surrogatepass"))
    chunks = list(split_files([path], chunk_bytes))
    found = [read_documents(chunk, "text") for chunk in chunks]
    assert [text for part in found for text in part.texts] == [text for text in texts if text.isprintable()]
    assert not any(part.bad_records for part in found)
    assert sum(part.num_lines for part in found) == len(path.read_bytes().splitlines())
    assert sum(chunk.num_bytes for chunk in chunks) == path.stat().st_size


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "not JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"body": "x", "id": 3}', "no key 'text'; keys are 'body', 'id'"),
        (b"{}", "keys are none"),
        (b'{"text": null}', "key 'text': expected text, found NoneType"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b'{"text": "a\\ud800"}', "half a surrogate pair at character 1"),
    ],
)
def test_a_bad_record_is_reported_with_its_line_and_left_out(tmp_path, line, reason):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n' + line + b'\n{"text": ""}\n')
    [chunk] = split_files([path])
    found = read_documents(chunk, "text")
    assert (found.texts, found.lines, found.num_lines) == (["a", ""], [1, 4], 4)
    [(number, why)] = found.bad_records
    assert number == 3 and reason in why


def test_a_text_file_is_one_document(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("two\nlines\n", encoding="utf-8")
    [chunk] = split_files([path], chunk_bytes=2)
    assert read_documents(chunk, "text").texts == ["two\nlines\n"]
    path.write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"x\.txt: text: expected UTF-8, found another byte at offset 2"):
        read_documents(chunk, "text")


def test_files_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "x.jsonl.gz").touch()
    for path, message in (
        (tmp_path / "no", "nothing"),
        (tmp_path, "a folder"),
        (tmp_path / "x.jsonl.gz", "unpack"),
    ):
        with pytest.raises(DataError, match=message):
            check_files([path])


def test_the_end_of_text_closes_documents_that_have_tokens():
    tokens, lengths = encode_documents(["ab", "", "c"], Letters(), np.dtype("u2"), True, 27, ["1", "2", "3"])
    assert (
        tokens.tolist() == [0, 1, 26, 2, 26] and lengths.tolist() == [3, 0, 2] and tokens.dtype == np.uint16
    )
    tokens, lengths = encode_documents(["ab", "", "c"], Letters(), np.dtype("u2"), False, 27, ["1", "2", "3"])
    assert tokens.tolist() == [0, 1, 2] and lengths.tolist() == [2, 0, 1]


def test_an_id_outside_is_named_with_its_document():
    with pytest.raises(DataError, match=r"second: token id: expected 0 to 24, found 25"):
        encode_documents(["ab", "z"], Letters(), np.dtype("u2"), False, 25, ["first", "second"])
    with pytest.raises(DataError, match=r"second: token id: expected 0 to 65535, found 128415"):
        encode_documents(["ab", "\U0001f600"], Letters(), np.dtype("u2"), False, 200_000, ["first", "second"])
