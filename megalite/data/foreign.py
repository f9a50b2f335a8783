"""Token files of other projects, read as documents. What they leave unsaid, the user says.

    flat       raw ids, no header: nanoGPT, lilLM, OLMo (.npy by name only)
    llmc       llm.c: 256 i32, of which [0] magic, [1] version, [2] number of tokens; then u16 or u32
    datatrove  FILE.ds raw ids; FILE.ds.index u64 ends of documents, in tokens; FILE.ds.metadata the id size

Everything is little endian. Flat and llm.c files know documents by an end-of-text id only, which stands at
the end of each document, at its start, or nowhere: then a file is one document.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalite.data.error import DataError
from megalite.data.token_file import open_bytes
from megalite.data.token_ids import check_ids

FORMATS = ("flat", "llmc", "datatrove")
ID_TYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
EOS_POSITIONS = ("end", "start", "none")
BLOCK_TOKENS = 1 << 22
_LLMC_HEADER_BYTES = 1024
_LLMC_KINDS: dict[tuple[int, int], np.dtype] = {
    (20240520, 1): ID_TYPES["uint16"],
    (20240801, 7): ID_TYPES["uint32"],
}
_OTHER_FILES = {  # first bytes of what is not raw ids
    b"\x93NUMPY": "a NumPy file with a header: write it with ndarray.tofile",
    b"MMIDIDX": "the index of a Megatron pair, which needs no import",
    b"LITPKDS": "a lit-gpt chunk, which is not read",
    b"\x1f\x8b": "gzip: unpack it",
    b"\x28\xb5\x2f\xfd": "zstandard: unpack it",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"PAR1": "Parquet: see tools/preprocess_data.py",
    (20240520).to_bytes(4, "little"): "llm.c: --format llmc",
    (20240801).to_bytes(4, "little"): "llm.c: --format llmc",
}

Pieces = Iterator[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Boundaries:
    """Flat ids are cut into documents at `eos_token_id`, which stands at their "end", "start", or "none"."""

    position: str
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.position not in EOS_POSITIONS:
            raise DataError(f"end-of-text position: expected one of {EOS_POSITIONS}, found {self.position!r}")
        if (self.position == "none") != (self.eos_token_id is None):
            found = "none" if self.eos_token_id is None else self.eos_token_id
            expected = "an id for positions start and end, and none for position none"
            raise DataError(f"--eos-token-id: expected {expected}, found {found} for {self.position}")


def read_flat(path: Path, dtype: np.dtype, boundaries: Boundaries) -> Pieces:
    """Documents as (ids, lengths [documents] whose sum is that of the ids), many at a time.

    Raises DataError when the file is of another kind or size, or holds no end-of-text id at all.
    """
    data = _open(path)
    for magic, kind in _OTHER_FILES.items():
        if data[: len(magic)].tobytes() == magic:
            raise DataError(f"{path}: expected raw {dtype} ids, found {kind}")
    return _cut(path, _ids(path, data, dtype), boundaries)


def read_llmc(path: Path, boundaries: Boundaries) -> Pieces:
    """As `read_flat`, from a file that states its own type and size."""
    data = _open(path)
    if len(data) < _LLMC_HEADER_BYTES:
        raise DataError(f"{path}: header: expected {_LLMC_HEADER_BYTES} bytes, found {len(data)}: truncated")
    magic, version, num_tokens = (int(value) for value in data[:12].view("<i4"))
    if (dtype := _LLMC_KINDS.get((magic, version))) is None:
        known = " or ".join(f"{kind[0]} version {kind[1]}" for kind in _LLMC_KINDS)
        raise DataError(f"{path}: header: expected magic {known}, found {magic} version {version}: not llm.c")
    ids = _ids(path, data[_LLMC_HEADER_BYTES:], dtype)
    if len(ids) != num_tokens:
        raise DataError(f"{path}: tokens: expected {num_tokens} by its header, found {len(ids)}: damaged")
    return _cut(path, ids, boundaries)


def read_datatrove(path: Path, dtype: np.dtype | None) -> Pieces:
    """As `read_flat`, from FILE.ds and the files beside it; `dtype` only where FILE.ds.metadata is missing.

    Raises DataError when the three files disagree.
    """
    named, counted = _read_metadata(Path(f"{path}.metadata"))
    if named and dtype and named != dtype:
        raise DataError(f"{path}.metadata: id type: expected {dtype} as you say, found {named}")
    if (kind := named or dtype) is None:
        raise DataError(f"{path}.metadata: id type: found nothing: name it with --dtype")
    ids = _ids(path, _open(path), kind)
    index = _open(Path(f"{path}.index"))
    if len(index) % 8:
        raise DataError(f"{path}.index: size: expected a multiple of 8 bytes, found {len(index)}: damaged")
    ends = index.view("<u8")
    if int(ends[-1]) != len(ids) or counted not in (None, len(ids)):
        found = f"{len(ids)}, {int(ends[-1])} in .index, {'?' if counted is None else counted} in .metadata"
        raise DataError(f"{path}: tokens: expected one number in all its files, found {found}: damaged")
    if (ends[1:] < ends[:-1]).any():
        raise DataError(f"{path}.index: ends of documents: expected them to rise, found a fall: damaged")
    return _group(ids, ends.astype(np.int64))


def check_pieces(path: Path, pieces: Pieces, vocab_size: int) -> Pieces:
    """The same; DataError for the first id that is not below `vocab_size`, naming its place."""
    before = 0

    def place(at: int) -> str:
        return f"{path}: at token {before + at:,}"

    for tokens, lengths in pieces:
        check_ids(tokens, vocab_size, place)
        before += len(tokens)
        yield tokens, lengths


def _open(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(
            f"{path}: file: expected it to exist, found {'a folder' if path.is_dir() else 'nothing'}"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: size: expected some bytes, found 0")
    return open_bytes(path)


def _ids(path: Path, data: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if len(data) % dtype.itemsize or len(data) == 0:
        expected = f"a multiple of {dtype.itemsize} bytes, as ids are {dtype}"
        raise DataError(
            f"{path}: size: expected {expected}, found {len(data)}: truncated, or another id type"
        )
    ids = data.view(dtype)
    first = ids[:BLOCK_TOKENS]
    if dtype.itemsize == 2 and len(first) >= 8 and not first[1::2].any() and first.any():
        raise DataError(f"{path}: ids: every second one is 0: the file looks like uint32, not {dtype}")
    return ids


def _read_metadata(path: Path) -> tuple[np.dtype | None, int | None]:
    """Id type and number of tokens as datatrove notes them: `tokenizer|bytes_per_token`, then the number."""
    if not path.is_file():
        return None, None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        size = int(lines[0].rpartition("|")[2])
        return {2: ID_TYPES["uint16"], 4: ID_TYPES["uint32"]}[size], int(lines[1])
    except (ValueError, KeyError, IndexError):
        expected = "'tokenizer|2' or 'tokenizer|4', then the number of tokens"
        raise DataError(
            f"{path}: expected {expected}, found something else: name --dtype and remove it"
        ) from None


def _cut(path: Path, ids: np.ndarray, boundaries: Boundaries) -> Pieces:
    if boundaries.eos_token_id is None:
        yield ids, np.array([len(ids)])
        return
    start = 0  # of the first document that is not out yet
    for block_start in range(0, len(ids), BLOCK_TOKENS):
        block = ids[block_start : block_start + BLOCK_TOKENS]
        cuts = np.flatnonzero(block == boundaries.eos_token_id) + block_start
        cuts += boundaries.position == "end"
        cuts = cuts[cuts > start]
        if len(cuts):
            yield ids[start : cuts[-1]], np.diff(cuts, prepend=start)
            start = int(cuts[-1])
    found_none = start == 0 and (boundaries.position == "end" or ids[0] != boundaries.eos_token_id)
    if found_none:
        remedy = "another id or id type, or --eos-position none?"
        raise DataError(
            f"{path}: end-of-text id {boundaries.eos_token_id}: expected it, found it nowhere: {remedy}"
        )
    if start < len(ids):
        yield ids[start:], np.array([len(ids) - start])


def _group(ids: np.ndarray, ends: np.ndarray) -> Pieces:
    """Documents that end at `ends`, in groups of about BLOCK_TOKENS."""
    first = start = 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, start + BLOCK_TOKENS, side="right")))
        end = int(ends[last - 1])
        yield ids[start:end], np.diff(ends[first:last], prepend=start)
        first, start = last, end
