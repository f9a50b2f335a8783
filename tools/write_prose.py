"""Write the English that every set-up brings along: what documents Python's modules, without the code."""

import argparse
import contextlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from megalite.data.corpus import SKIPPED_FOLDERS
from megalite.data.error import DataError
from megalite.error import run_command
from megalite.files import written_aside

EPILOG = """\
The texts are the language reference in `pydoc_data`, then what stands in triple quotes in Python's standard
library and in the packages installed beside it, files sorted by path. Of these, paragraphs that read as
English are kept, each the first time that it occurs. A document holds those of one file.

example:
  python tools/write_prose.py --output prose.jsonl --max-bytes 1000000
"""
QUOTED = re.compile(r'"""(.*?)"""', re.DOTALL)
MARKUP = re.compile(r":\w+(?::\w+)?:(?=`)|[`*]|(?<=\s)\\")  # of reStructuredText
SYMBOLS = re.compile(r"[{}<>=\[\]\\|_#@~^$+/]|::|--|\.\.")  # they belong to code, formulas and tables
WORD = re.compile(r"[(\"']*[A-Za-z][a-z'-]*[.,;:?!)\"']*")  # an English one, with its punctuation
MIN_CHARACTERS = 60
MIN_WORDS_SHARE = 0.9


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the prose is written, 2 when the user can put it right."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    parser.add_argument("--output", type=Path, required=True, metavar="JSONL", help="file to write")
    most = "stop before the prose exceeds N bytes (default: all)"
    parser.add_argument("--max-bytes", type=int, metavar="N", help=most)
    arguments = parser.parse_args(argv)
    return run_command(lambda: write(arguments.output, arguments.max_bytes))


def write(path: Path, max_bytes: int | None) -> None:
    """Write the documents as JSON lines with keys `text` and `path`. DataError when there are none."""
    count = total = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as file:
        for name, text in tqdm(read_prose(), desc="reading", unit=" documents", leave=False):
            total += len(text.encode())
            if max_bytes is not None and total > max_bytes:
                break
            file.write(json.dumps({"text": text, "path": name}, ensure_ascii=False) + "\n")
            count += 1
        if not count:
            raise DataError(f"no prose of at most {max_bytes} bytes found here: raise --max-bytes")
    print(f"{path}: {count:,} documents")


def read_prose() -> Iterator[tuple[str, str]]:
    """(name, prose) of every text that has any, in an order that is always the same."""
    seen: set[str] = set()
    for name, text in read_texts():
        new = [paragraph for paragraph in find_paragraphs(text) if paragraph not in seen]
        seen.update(new)
        if new:
            yield name, "\n\n".join(dict.fromkeys(new))


def read_texts() -> Iterator[tuple[str, str]]:
    """(name, documentation) of each topic of the language reference, and of each source file."""
    with contextlib.suppress(ImportError):  # some systems leave it out
        from pydoc_data.topics import topics

        yield from sorted(topics.items())
    for root in dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")):
        for path in find_sources(Path(root)):
            source = path.read_text(encoding="utf-8", errors="ignore")
            yield path.relative_to(root).as_posix(), "\n\n".join(QUOTED.findall(source))


def find_sources(root: Path) -> Iterator[Path]:
    """Python files below `root`, sorted; inside it, folders of packages and tests are not entered."""
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def find_paragraphs(text: str) -> Iterator[str]:
    """The paragraphs that read as English, each on one line, without markup."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = MARKUP.sub("", " ".join(paragraph.split()))
        if is_prose(line):
            yield line


def is_prose(line: str) -> bool:
    """Whether a line begins and ends like a sentence, has no symbols of code, and hardly any but words."""
    if len(line) < MIN_CHARACTERS or not line[0].isupper() or line[-1] not in ".?!:" or SYMBOLS.search(line):
        return False
    words = line.split()
    return sum(WORD.fullmatch(word) is not None for word in words) >= MIN_WORDS_SHARE * len(words)


if __name__ == "__main__":
    sys.exit(main())
