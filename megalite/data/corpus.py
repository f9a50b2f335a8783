"""A corpus that every machine has: the source of Python's standard library, one document per file."""

import json
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from megalite.data.encoding import Encoder, EncodingPlan
from megalite.data.error import DataError
from megalite.data.indexed_dataset import IndexedDataset
from megalite.data.indexed_writer import dtype_for
from megalite.data.input_block import InputBlock, Rows
from megalite.data.preprocess import Job, preprocess
from megalite.files import write_text, written_aside

SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class FingerprintedEncoder(Encoder, Protocol):
    """A tokenizer that can say whether it is the same one as before."""

    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Loaded:
    """A tokenizer that is here already."""

    encoder: Encoder

    def load(self) -> Encoder:
        """Itself."""
        return self.encoder


@dataclass(frozen=True)
class StandardLibrary:
    """The corpus as an input of preprocessing: a block per file, with progress of its own."""

    limit_bytes: int | None
    name: str = "Python standard library"
    num_bytes: int | None = None

    def blocks(self, max_bytes: int) -> Iterator[InputBlock]:
        """All files, as tables of one row."""
        for name, text in _documents(self.limit_bytes):
            content = text.encode()
            yield Rows(name, len(content), 0, [[content]])


def read_corpus(folder: Path | None = None, max_bytes: int | None = None) -> Iterator[tuple[str, str]]:
    """(path below the library, text) of every UTF-8 source file, sorted, until `max_bytes` of text."""
    root = Path(sysconfig.get_paths()["stdlib"]) if folder is None else folder
    total = 0
    for name in _source_files(root):
        content = (root / name).read_bytes()
        if max_bytes is not None and total + len(content) > max_bytes:
            return
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        total += len(content)
        yield name, text


def _source_files(root: Path) -> list[str]:
    """Python files below `root`, sorted; folders of packages and tests are not entered."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - SKIPPED_FOLDERS
        names += [Path(folder, file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    return sorted(names)


def write_jsonl(path: str | Path, max_bytes: int | None = None) -> int:
    """Write the corpus as JSON lines with keys `text` and `path`; returns the number of documents."""
    count = 0
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as file:
        for name, text in _documents(max_bytes):
            file.write(json.dumps({"text": text, "path": name}, ensure_ascii=False) + "\n")
            count += 1
    return count


def prepare_default_data(
    folder: str | Path, tokenizer: FingerprintedEncoder, max_bytes: int | None = None
) -> str:
    """Tokenize the corpus into `folder`, end-of-text id after each file; returns the pair's prefix.

    A complete pair of the same Python, tokenizer and size is used again. For one process: others wait for it.
    """
    prefix = str(Path(folder, "python_stdlib_text_document"))
    made_from = {
        "python": platform.python_version(),
        "tokenizer": tokenizer.fingerprint(),
        "max_bytes": max_bytes,
    }
    if not _is_complete(prefix, made_from):
        Path(f"{prefix}.json").unlink(missing_ok=True)
        size = tokenizer.vocab_size
        plan = EncodingPlan(Loaded(tokenizer), ("text",), True, size, dtype_for(size), sys.maxsize)
        preprocess(Job(plan, [StandardLibrary(max_bytes)], [prefix]))
        write_text(f"{prefix}.json", json.dumps(made_from, indent=2) + "\n")
    return prefix


def _is_complete(prefix: str, made_from: dict) -> bool:
    """Whether the note beside the pair says that it was made from the same things, and the pair is whole."""
    try:
        if json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8")) != made_from:
            return False
        IndexedDataset(prefix)
    except (OSError, ValueError):  # DataError is a ValueError
        return False
    return True


def _documents(max_bytes: int | None) -> Iterator[tuple[str, str]]:
    """The corpus with progress; DataError when nothing was found."""
    empty = True
    with tqdm(desc="Python standard library", unit="B", unit_scale=True, leave=False) as bar:
        for name, text in read_corpus(max_bytes=max_bytes):
            empty = False
            yield name, text
            bar.update(len(text))
    if empty:
        where = sysconfig.get_paths()["stdlib"]
        raise DataError(f"{where}: corpus: expected Python source files, found none: name data.train instead")
