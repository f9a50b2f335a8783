"""Conversations and pairs as token files, kept on disk and found again by what they were made from.

    FOLDER/KEY/             KEY: SHA-256 of what decides the tokens, as canonical JSON; no path
        tokens.bin .idx     ids of each sequence; a pair is two sequences, chosen and rejected
        learnt.bin .idx     1 for each token that is learnt, 2 where it is one to avoid, else 0; u8
        manifest.json       what they were made from, which records were left out, SHA-256 of each file

An entry is complete or absent. It is verified each time it is opened; one that fails is made again. Several
processes may make it at once: the first to rename publishes, the others use that.
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megalite.data.conversation import Learnt
from megalite.data.error import DataError
from megalite.data.indexed_dataset import IndexedDataset
from megalite.data.indexed_writer import UINT8, IndexedDatasetWriter, dtype_for
from megalite.data.rows import Row, RowSource
from megalite.error import UnusableRecordError, UserError
from megalite.files import aside_of, folder_aside, write_text

VERSION = 1  # of the tokens as well: another way of making them must not find the former ones
MANIFEST, TOKENS, LEARNT = "manifest.json", "tokens", "learnt"
SAID, AVOIDED = np.uint8(1), np.uint8(2)
_FILES = (f"{TOKENS}.bin", f"{TOKENS}.idx", f"{LEARNT}.bin", f"{LEARNT}.idx")


@dataclass
class LeftOut:
    """Records that were left out for one reason: how many, and where the first stands and what it says."""

    reason: str
    count: int
    where: str
    detail: str

    def __str__(self) -> str:
        first = f"{self.where}: {self.detail}" if self.detail else self.where
        return f"{self.count:,} with {self.reason} (first: {first})"


class PreparedSource:
    """The sequences of one source, opened.

    Attributes: name (of the source); tokens, learnt; left_out; num_records, of the source.

    Raises DataError when anything about the entry is not as it was written.
    """

    def __init__(self, name: str, entry: Path) -> None:
        self.name = name
        try:
            manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
            self.sha256: dict[str, str] = manifest["sha256"]
            self.left_out = [LeftOut(**fields) for fields in manifest["left_out"]]
            self.num_records = int(manifest["num_records"])
            if (found := _hashes(entry)) != self.sha256:
                raise DataError(f"files with SHA-256 {found}, expected {self.sha256}")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"{entry}: prepared data: expected an intact entry, found: {error}") from error
        self.tokens, self.learnt = IndexedDataset(entry / TOKENS), IndexedDataset(entry / LEARNT)

    def __len__(self) -> int:
        return len(self.tokens)

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids i64 and, per token, whether it is learnt."""
        return self.tokens[index].astype(np.int64), self.learnt[index].astype(bool)

    def is_desirable(self, index: int) -> bool:
        """Whether what is learnt of a sequence is to be said, and not avoided."""
        return AVOIDED not in self.learnt[index]

    def summary(self) -> str:
        """What was found and what left out, in one line."""
        count, learnt = len(self), int(np.count_nonzero(self.learnt.tokens[:]))
        line = f"{self.name}: {count:,} sequences, {self.tokens.num_tokens:,} tokens, {learnt:,} learnt"
        if not self.left_out:
            return line
        total = sum(kind.count for kind in self.left_out)
        return f"{line}; left out {total:,} of {self.num_records:,} records: {_listed(self.left_out)}"


def open_prepared(
    source: RowSource,
    encode: Callable[[Row], list[Learnt]],
    *,
    made_from: Mapping[str, Any],
    vocab_size: int,
    cache_dir: str | Path,
    progress: bool = False,
) -> PreparedSource:
    """A source's sequences, found in the cache or made by `encode`.

    encode: raises UnusableRecordError for a record that is left out.

    made_from: all that decides them besides the source's content, JSON-able.

    Raises DataError when the source cannot be read or none of its records can be used.
    """
    made_from = {"version": VERSION, **made_from, "content": source.content_sha256}
    entry = Path(cache_dir) / hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    try:
        if entry.exists():
            return PreparedSource(source.name, entry)
    except DataError as error:
        warnings.warn(f"{error}: prepared again", stacklevel=2)
    try:
        with folder_aside(entry) as aside:
            _prepare(aside, source, encode, made_from, vocab_size, progress)
            _make_room(source.name, entry)
    except OSError:  # a faster one has published it by then
        if not entry.exists():
            raise
    return PreparedSource(source.name, entry)


def _prepare(
    folder: Path,
    source: RowSource,
    encode: Callable[[Row], list[Learnt]],
    made_from: Mapping[str, Any],
    vocab_size: int,
    progress: bool,
) -> None:
    left_out: dict[str, LeftOut] = {}
    num_records = 0
    tokens, learnt = (folder / name for name in (TOKENS, LEARNT))
    rows = tqdm(source.rows(), desc=source.name, unit="record", leave=False, disable=not progress)
    with (
        IndexedDatasetWriter(tokens, dtype_for(vocab_size)) as ids,
        IndexedDatasetWriter(learnt, UINT8) as mask,
    ):
        for where, row in rows:
            num_records += 1
            try:
                if isinstance(row, UnusableRecordError):
                    raise row
                sequences = encode(row)
            except UnusableRecordError as error:
                first = LeftOut(error.reason, 0, where, error.detail)
                left_out.setdefault(error.reason, first).count += 1
                continue
            except UserError as error:  # what is wrong with more than a record
                raise DataError(f"{where}: {error}") from error
            ids.add_document([np.array(one.ids, np.int64) for one in sequences])
            values = [SAID if one.is_desirable else AVOIDED for one in sequences]
            masks = [np.array(one.is_learnt, np.uint8) for one in sequences]
            mask.add_document([value * one for value, one in zip(values, masks, strict=True)])
    kinds = sorted(left_out.values(), key=lambda kind: -kind.count)
    if ids.num_documents == 0:
        found = f"{num_records:,} records, {_listed(kinds)}" if kinds else "no record"
        raise DataError(f"{source.name}: nothing to learn from: {found}")
    manifest = {"made_from": made_from, "num_records": num_records, "sha256": _hashes(folder)}
    manifest["left_out"] = [asdict(kind) for kind in kinds]
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))


def _make_room(name: str, entry: Path) -> None:
    """Remove an entry that is damaged: a rename to its name would be refused."""
    try:
        if entry.exists():
            PreparedSource(name, entry)
    except DataError:
        shutil.rmtree(entry.rename(aside_of(entry)), ignore_errors=True)


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for name in _FILES:
        with (folder / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _listed(kinds: Iterable[LeftOut]) -> str:
    return "; ".join(map(str, kinds))
