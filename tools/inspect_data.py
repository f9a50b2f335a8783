"""What a Megatron dataset holds: header, counts, lengths, decoded samples, and whether it is sound."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megalite.data.error import DataError
from megalite.data.indexed_dataset import IndexedDataset, bin_path, idx_path
from megalite.error import UserError, run_command
from megalite.measure.figure import save_figure
from megalite.tokenizer.load import load_tokenizer
from megalite.tokenizer.tokenizer import Tokenizer

EPILOG = """\
Opening checks the whole index, and the sizes of both files against it. --verify also reads every id: none may
be negative, or reach the vocabulary's size. The last line is the verdict; the exit status is 0 when it says
"sound", else 2.

examples:
  python tools/inspect_data.py data/corpus_text_document --tokenizer tokenizers/mine --verify
  python tools/inspect_data.py data/corpus_text_document --vocab-size 50257 --verify --plot lengths.png
"""
BLOCK_TOKENS = 1 << 22
BAR_WIDTH = 40
SAMPLE_TOKENS = 64


@dataclass
class Scan:
    """What reading every id found."""

    largest: int = -1
    num_bad: int = 0
    first_bad: str = ""
    num_closed: int = 0  # documents whose last id is the end of text


def describe(dataset: IndexedDataset) -> Iterator[str]:
    """Header and counts."""
    lengths, boundaries = dataset.sequence_lengths, dataset.document_indices
    empty = int((np.diff(boundaries) == 0).sum())
    for path in (bin_path(dataset.prefix), idx_path(dataset.prefix)):
        yield f"{path}: {path.stat().st_size:,} bytes"
    yield f"ids          {dataset.dtype}, little endian"
    yield f"documents    {dataset.num_documents:,}" + (f", {empty:,} of them empty" if empty else "")
    yield f"sequences    {len(dataset):,}"
    yield f"tokens       {dataset.num_tokens:,}"
    if len(lengths):
        middle = f"median {int(np.median(lengths)):,}, mean {dataset.num_tokens / len(lengths):,.1f}"
        yield f"lengths      {int(lengths.min()):,} to {int(lengths.max()):,} tokens per sequence, {middle}"


def count_lengths(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """(least, most, sequences) for lengths 0, 1, 2 to 3, 4 to 7, ... up to the longest."""
    edges = [0, *(1 << power for power in range(33))]
    counts = np.histogram(lengths, edges)[0] if len(lengths) else np.zeros(1, int)
    used = np.flatnonzero(counts)
    rows = range(used[0], used[-1] + 1) if len(used) else range(0)
    return [(edges[row], edges[row + 1] - 1, int(counts[row])) for row in rows]


def draw_lengths(lengths: np.ndarray) -> Iterator[str]:
    """A histogram in text."""
    rows = count_lengths(lengths)
    most = max(count for *_, count in rows) if rows else 1
    for least, largest, count in rows:
        span = f"{least:,}" if least == largest else f"{least:,} to {largest:,}"
        bar = "#" * max(round(BAR_WIDTH * count / max(most, 1)), count > 0)
        yield f"{span:>26} | {bar:<{BAR_WIDTH}} {count:,}"


def plot_lengths(lengths: np.ndarray, path: Path, title: str) -> None:
    """The histogram as a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot: expected matplotlib, found nothing: pip install 'megalite[plot]'") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    edges = np.geomspace(1, max(int(lengths.max(initial=1)), 2) + 1, 60)
    axes.hist(lengths, edges.tolist(), color="#4477aa")
    axes.set(xscale="log", xlabel="tokens in a sequence", ylabel="sequences", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dots_per_inch=120)


def decode_samples(dataset: IndexedDataset, tokenizer: Tokenizer, number: int) -> Iterator[str]:
    """The beginnings of some documents, evenly spread over the file."""
    chosen = np.linspace(0, dataset.num_documents - 1, min(number, dataset.num_documents))
    for document in np.unique(chosen.astype(int)):
        ids = dataset.document(int(document))
        text = repr(_decode(tokenizer, ids[:SAMPLE_TOKENS].tolist()))
        rest = f" and {len(ids) - SAMPLE_TOKENS:,} more tokens" if len(ids) > SAMPLE_TOKENS else ""
        yield f"document {document:,}: {text}{rest}"


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    if any(not 0 <= token < tokenizer.vocab_size for token in ids):
        return f"<ids outside the tokenizer's {tokenizer.vocab_size:,}: {ids[:8]} ...>"
    return tokenizer.decode(ids)


def scan_ids(dataset: IndexedDataset, vocab_size: int | None, eos_token_id: int | None) -> Scan:
    """Read every id, with progress."""
    found, ends = Scan(), document_ends(dataset)
    with tqdm(total=dataset.num_tokens, desc="verify", unit="token", unit_scale=True) as bar:
        for start in range(0, dataset.num_tokens, BLOCK_TOKENS):
            block = dataset.tokens[start : start + BLOCK_TOKENS]
            found.largest = max(found.largest, int(block.max()))
            bad = block < 0 if vocab_size is None else (block < 0) | (block >= vocab_size)
            if bad.any() and not found.num_bad:
                place = int(np.argmax(bad))
                found.first_bad = f"id {int(block[place])} at token {start + place:,}"
            found.num_bad += int(bad.sum())
            first, last = np.searchsorted(ends, [start, start + len(block)])
            found.num_closed += int((block[ends[first:last] - start] == eos_token_id).sum())
            bar.update(len(block))
    return found


def document_ends(dataset: IndexedDataset) -> np.ndarray:
    """Place of the last token of each document that has tokens."""
    stops = np.append(dataset.sequence_pointers // dataset.dtype.itemsize, dataset.num_tokens)
    return np.unique(stops[dataset.document_indices])[1:] - 1


def verify(dataset: IndexedDataset, vocab_size: int | None, tokenizer: Tokenizer | None) -> Iterator[str]:
    """What the ids are; DataError when some are wrong."""
    eos = None if tokenizer is None or tokenizer.eos_token is None else tokenizer.eos_token_id
    found = scan_ids(dataset, vocab_size, eos)
    if found.num_bad:
        expected = "at least 0" if vocab_size is None else f"0 to {vocab_size - 1}"
        others = f"{found.num_bad:,} such ids: wrong tokenizer, or damaged"
        raise DataError(
            f"{bin_path(dataset.prefix)}: ids: expected {expected}, found {found.first_bad}: {others}"
        )
    yield f"largest id   {found.largest:,}"
    if eos is not None:
        number = f"{found.num_closed:,} of {len(document_ends(dataset)):,}"
        yield f"end of text  {number} documents with tokens end with id {eos}"


def inspect(arguments: argparse.Namespace) -> None:
    """Print what was asked for. Raises DataError when the data is damaged."""
    if arguments.samples < 0 or (arguments.vocab_size or 1) < 1:
        found = f"{arguments.samples} and {arguments.vocab_size}"
        raise UserError(f"--samples, --vocab-size: expected at least 0 and 1, found {found}")
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    vocab_size = arguments.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    dataset = IndexedDataset(arguments.prefix)
    lines = [*describe(dataset), "", *draw_lengths(dataset.sequence_lengths)]
    if tokenizer is not None and arguments.samples:
        lines += ["", *decode_samples(dataset, tokenizer, arguments.samples)]
    print("\n".join(lines))
    if arguments.plot:
        plot_lengths(dataset.sequence_lengths, arguments.plot, dataset.prefix)
        print(f"\nplot         {arguments.plot}")
    print()
    if arguments.verify:
        print("\n".join(verify(dataset, vocab_size, tokenizer)))
    print(f"verdict: {verdict(arguments.verify, vocab_size)}")


def verdict(verified: bool, vocab_size: int | None) -> str:
    """What is known of data in which nothing wrong was found."""
    if not verified:
        return "sound, as far as the index tells; --verify reads the ids too"
    if vocab_size is None:
        return "sound, but no vocabulary was named: see --tokenizer and --vocab-size"
    return f"sound: the index fits, and every id is below {vocab_size:,}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    add("prefix", metavar="PREFIX", help="the dataset PREFIX.bin and PREFIX.idx; either ending may be there")
    tokenizer = "decode samples with it: folder, name, tokenizer.json, .model, 'bytes'"
    add("--tokenizer", metavar="T", help=tokenizer)
    add("--samples", type=int, default=3, metavar="N", help="documents to decode (default: 3)")
    add("--verify", action="store_true", help="read every id of the file")
    size = "with --verify: an id from N on is an error (default: the tokenizer's size)"
    add("--vocab-size", type=int, metavar="N", help=size)
    add("--plot", type=Path, metavar="FILE.png", help="draw the lengths as a picture")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the data is sound, 2 when it is not or cannot be read."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: judge(arguments))


def judge(arguments: argparse.Namespace) -> None:
    """Inspect, and end with a verdict also where the data is damaged."""
    try:
        inspect(arguments)
    except DataError:
        print("verdict: NOT sound")
        raise


if __name__ == "__main__":
    sys.exit(main())
