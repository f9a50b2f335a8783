import gzip
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data import foreign
from megalite.data.error import DataError
from megalite.data.foreign import Boundaries, check_pieces, read_datatrove, read_flat, read_llmc

EOS = 9
U2, U4 = np.dtype("<u2"), np.dtype("<u4")


def documents(pieces):
    """Each document as a list of ids."""
    found = []
    for tokens, lengths in pieces:
        assert lengths.sum() == len(tokens)
        found += [part.tolist() for part in np.split(np.asarray(tokens), np.cumsum(lengths)[:-1])]
    return found


def write_flat(path, ids, dtype=U2):
    np.array(ids, dtype).tofile(path)
    return path


def write_llmc(path, ids, magic=20240520, version=1, count=None, dtype=U2):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.array(ids, dtype).tobytes())
    return path


def write_datatrove(path, parts, dtype=U2, metadata="gpt2|2\n{}"):
    write_flat(path, [*chain.from_iterable(parts)], dtype)
    ends = np.cumsum([len(part) for part in parts])
    ends.astype("<u8").tofile(f"{path}.index")
    if metadata:
        path.with_name(f"{path.name}.metadata").write_text(metadata.format(ends[-1]))
    return path


BODIES = st.lists(st.lists(st.integers(0, 8), max_size=5), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), bodies=BODIES, block=st.integers(1, 12), partial=st.booleans())
def test_documents_are_cut_at_the_end_of_text_wherever_blocks_end(
    tmp_path_factory, data, bodies, block, partial
):
    position = data.draw(st.sampled_from(["end", "start"]))
    parts = [[*body, EOS] if position == "end" else [EOS, *body] for body in bodies]
    extra = [1, 2] if partial else []  # a file that begins or ends in the middle of a document
    expected = [*parts, extra] if position == "end" else [extra, *parts]
    path = write_flat(tmp_path_factory.mktemp("d") / "x.bin", [*chain.from_iterable(expected)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign, "BLOCK_TOKENS", block)
        found = documents(check_pieces(path, read_flat(path, U2, Boundaries(position, EOS)), 10))
    assert found == [part for part in expected if part]


def test_the_position_of_the_end_of_text_matters(tmp_path):
    path = write_flat(tmp_path / "x.bin", [1, EOS, 2, 3, EOS])
    assert documents(read_flat(path, U2, Boundaries("end", EOS))) == [[1, EOS], [2, 3, EOS]]
    assert documents(read_flat(path, U2, Boundaries("start", EOS))) == [[1], [EOS, 2, 3], [EOS]]
    assert documents(read_flat(path, U2, Boundaries("none"))) == [[1, EOS, 2, 3, EOS]]


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, U2), (20240801, 7, U4)])
def test_llmc_files_state_their_type(tmp_path, magic, version, dtype):
    path = write_llmc(tmp_path / "x.bin", [EOS, 1, EOS, 2], magic, version, dtype=dtype)
    assert documents(read_llmc(path, Boundaries("start", EOS))) == [[EOS, 1], [EOS, 2]]


@settings(max_examples=40, deadline=None)
@given(parts=BODIES.filter(lambda parts: any(parts)), block=st.integers(1, 12))
def test_datatrove_documents_end_where_the_index_says(tmp_path_factory, parts, block):
    path = write_datatrove(tmp_path_factory.mktemp("d") / "x.ds", parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(foreign, "BLOCK_TOKENS", block)
        assert documents(read_datatrove(path, None)) == parts


def test_datatrove_ids_are_as_wide_as_the_metadata_says(tmp_path):
    wide = write_datatrove(tmp_path / "x.ds", [[70_000, 1], [2]], U4, "llama|4\n{}")
    assert documents(read_datatrove(wide, None)) == documents(read_datatrove(wide, U4)) == [[70_000, 1], [2]]
    with pytest.raises(DataError, match="id type: expected uint16 as you say, found uint32"):
        read_datatrove(wide, U2)
    bare = write_datatrove(tmp_path / "y.ds", [[1]], U2, None)
    assert documents(read_datatrove(bare, U2)) == [[1]]
    with pytest.raises(DataError, match="found nothing: name it with --dtype"):
        read_datatrove(bare, None)


@pytest.mark.parametrize(
    ("content", "dtype", "message"),
    [
        (b"", U2, "size: expected some bytes, found 0"),
        (b"abc", U2, "expected a multiple of 2 bytes, as ids are uint16, found 3"),
        (b"abcdef", U4, "expected a multiple of 4 bytes, as ids are uint32, found 6"),
        (b"\x93NUMPY" + bytes(100), U2, "found a NumPy file with a header"),
        (gzip.compress(b"abc" * 9, mtime=0) + b"1", U2, "found gzip: unpack it"),
        (np.array([1, 2, 3, 4, 9], U4).tobytes(), U2, "looks like uint32, not uint16"),
        (np.array([20240520, 1], "<i4").tobytes(), U2, "found llm.c: --format llmc"),
        (np.array([1, 2, 3], U2).tobytes(), U2, "end-of-text id 9: expected it, found it nowhere"),
    ],
)
def test_what_is_no_flat_file_is_refused(tmp_path, content, dtype, message):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(DataError, match=message):
        documents(read_flat(tmp_path / "x.bin", dtype, Boundaries("end", EOS)))


def test_a_damaged_llmc_or_datatrove_file_is_refused(tmp_path):
    for path, message in (
        (write_flat(tmp_path / "a", [1, 2]), "header: expected 1024 bytes, found 4"),
        (write_llmc(tmp_path / "b", [1], magic=3), "found 3 version 1: not llm.c"),
        (write_llmc(tmp_path / "c", [1, EOS], count=3), "tokens: expected 3 by its header, found 2"),
    ):
        with pytest.raises(DataError, match=message):
            read_llmc(path, Boundaries("start", EOS))
    for metadata in ("", "gpt2|2", "gpt2|3\n3", "gpt2\n3", "gpt2|2\nmany"):
        with pytest.raises(DataError, match=r"expected 'tokenizer\|2' or 'tokenizer\|4'"):
            path = write_datatrove(tmp_path / "x.ds", [[1, 2], [3]], metadata=metadata or "\n")
            read_datatrove(path, None)
    write_datatrove(tmp_path / "x.ds", [[1, 2], [3]])
    for ends, message in (([2, 4], "3, 4 in .index, 3 in"), ([4, 2, 3], "found a fall"), ([], "found 0")):
        np.array(ends, "<u8").tofile(tmp_path / "x.ds.index")
        with pytest.raises(DataError, match=message):
            read_datatrove(tmp_path / "x.ds", None)
    with pytest.raises(DataError, match="expected one number in all its files"):
        read_datatrove(write_datatrove(tmp_path / "x.ds", [[1]], metadata="gpt2|2\n7"), None)


def test_an_id_outside_the_vocabulary_is_named_with_its_place(tmp_path):
    path = write_flat(tmp_path / "x.bin", [1, EOS, 8, EOS])
    pieces = read_flat(path, U2, Boundaries("end", EOS))
    with pytest.raises(DataError, match="token id: expected 0 to 7, found 9"):
        documents(check_pieces(path, pieces, 8))


def test_an_end_of_text_without_a_place_is_refused():
    for position, token in (("end", None), ("none", 3), ("middle", 3)):
        with pytest.raises(DataError, match="expected"):
            Boundaries(position, token)
