"""Tell what checkpoints hold, whether they are sound, and where two of them differ."""

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from megalite.checkpoint.base import Base
from megalite.checkpoint.format import CONFIG, CheckpointError, folder_step
from megalite.checkpoint.load import PLACES
from megalite.checkpoint.stream import Block
from megalite.error import run_command
from megalite.inspection.comparison import changes, compare
from megalite.inspection.contents import facts_of_checkpoint, facts_of_run, facts_of_tensors
from megalite.inspection.inventory import Item, look_at, require_folders, require_item, size_to_read
from megalite.inspection.page import checkpoint_in_words, run_in_words
from megalite.inspection.source import is_hf_folder, open_pair, records_of
from megalite.inspection.table import as_json
from megalite.inspection.verdict import comparison_in_words, facts_of_comparison

EPILOG = """\
Of a run, or of its checkpoints folder, all checkpoints are listed; with --tensors, --config or --compare it
stands for the newest that is complete. Whether all files are there, in their sizes, is always looked at;
whether those of tensors are what was written, with --verify.

--compare says whether two checkpoints hold the same tensors bit for bit, whatever layouts wrote them, and
where they do not. A relative difference is |a - b| / max(|a|, |b|). Differences of state and configs are
shown, and do not count. With a Hugging Face folder, weights alone are compared, rounded to the folder's
precision; adapters are merged. Memory: some blocks of a tensor, and the libraries.

The exit status is 0 when all is sound, or equal; 1 when something is damaged, or different; 2 when there is
nothing to look at, or to compare.

examples:
  python tools/inspect_checkpoint.py runs/first
  python tools/inspect_checkpoint.py runs/first/checkpoints/step-00000100 --tensors --verify
  python tools/inspect_checkpoint.py runs/first --compare runs/second
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help=PLACES)
    add("--tensors", action="store_true", help="list each tensor, with its numbers; with --compare all lines")
    add("--config", action="store_true", help="print the resolved config.yaml of the run, and nothing else")
    add("--verify", action="store_true", help="read every file, and check it against its sha256")
    other = "compare with this one: the same places, or a Hugging Face folder"
    add("--compare", type=Path, metavar="OTHER", help=other)
    add("--json", action="store_true", help="print a JSON object in place of words")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when all is sound or equal, 1 when not, 2 when nothing can be said."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.compare and (arguments.verify or arguments.config):
        parser.error("--compare does not go with --verify or --config: do one after the other")
    if arguments.config and (arguments.verify or arguments.tensors or arguments.json):
        parser.error("--config prints that file alone: leave out the other options")
    return run_command(lambda: inspect(arguments))


def inspect(arguments: argparse.Namespace) -> int:
    """Do what was asked for; the exit status."""
    if arguments.compare:
        return show_comparison(arguments)
    if arguments.config:
        print((require_item(arguments.folder).folder / CONFIG).read_text(encoding="utf-8"), end="")
        return 0
    folders = require_folders(arguments.folder)
    if folder_step(arguments.folder) is None and not arguments.tensors:
        return show_run(arguments, folders[::-1])
    return show_checkpoint(arguments, folders[0])


def show_run(arguments: argparse.Namespace, folders: list[Path]) -> int:
    """The list; 1 when one is damaged."""
    facts = facts_of_run(arguments.folder, look_at_all(folders, arguments.verify), verified=arguments.verify)
    show(arguments, facts, run_in_words(facts, time.time()))
    return 0 if all(checkpoint["valid"] for checkpoint in facts["checkpoints"]) else 1


def look_at_all(folders: list[Path], verify: bool) -> list[Item]:
    """Each checkpoint; where files are read, a bar shows how far that is."""
    total = size_to_read(folders) if verify else 0
    bases: dict[Base, list[str]] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not verify) as bar:

        def watch(block: Block) -> None:
            bar.update(len(block))

        return [look_at(folder, watch, checksums=verify, bases=bases) for folder in folders]


def show_checkpoint(arguments: argparse.Namespace, newest: Path) -> int:
    """The page of one; 1 when it is damaged."""
    folder = newest if folder_step(arguments.folder) is not None else require_item(arguments.folder).folder
    (item,) = look_at_all([folder], arguments.verify)
    if item.manifest is None and not arguments.verify:
        raise CheckpointError(f"{item.folder} is not a valid checkpoint: {item.damage[0]}")
    tensors = facts_of_tensors(item, statistics=arguments.tensors)
    total = len(item.manifest.tensors) if item.manifest else 0
    read = tqdm(tensors, total=total, desc="read", unit="tensor", disable=not arguments.tensors)
    facts = facts_of_checkpoint(item, read, verified=arguments.verify)
    show(arguments, facts, checkpoint_in_words(facts, time.time()))
    return 0 if item.is_valid else 1


def show_comparison(arguments: argparse.Namespace) -> int:
    """Two, side by side; 1 when their tensors are not the same."""
    a = require_item(arguments.folder)
    b = arguments.compare if is_hf_folder(arguments.compare) else require_item(arguments.compare)
    first, second = open_pair(a, b)
    total = sum(item.num_elements for item in a.manifest.tensors) if a.manifest else 0
    with tqdm(total=total, desc="compare", unit="element", unit_scale=True) as bar:
        found = compare(first, second, bar.update)
    records = {}
    if isinstance(b, Item):
        there = records_of(b)
        records = {file: changes(record, there[file]) for file, record in records_of(a).items()}
    names = str(a.folder), str(b.folder if isinstance(b, Item) else b)
    facts = facts_of_comparison(*names, found, records)
    show(arguments, facts, comparison_in_words(*names, found, records, all_lines=arguments.tensors))
    return 0 if found.is_equal else 1


def show(arguments: argparse.Namespace, facts: dict, words: Iterable[str]) -> None:
    """Print for people or for machines."""
    print(as_json(facts) if arguments.json else "\n".join(words))


if __name__ == "__main__":
    sys.exit(main())
