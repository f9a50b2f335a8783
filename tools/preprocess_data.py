"""Text to Megatron token files: JSON lines or plain text in, .bin and .idx out."""

import argparse
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np
from tqdm import tqdm

from megalite.data.documents import Chunk, check_files, encode_documents, read_documents, split_files
from megalite.data.error import DataError
from megalite.data.indexed_writer import IndexedDatasetWriter, dtype_for
from megalite.tokenizer.tokenizer import Tokenizer, load_tokenizer

EPILOG = """\
input:
  .jsonl .ndjson .json   one JSON object per line, each a document; its text is under --json-key
  any other text file    the whole file is one document
  All text is UTF-8. Documents keep the order of the files and lines, whatever --workers is.

output:
  P_text_document.bin and P_text_document.idx, for --output-prefix P and --json-key text. Train on them with
  data.train=[P_text_document]. Ids are uint16 for vocabularies below 65,500, else int32. An existing pair is
  replaced when the new one is complete.

example:
  python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
         --tokenizer bytes --append-eod
"""


@dataclass
class Encoded:
    """What a worker returns for a chunk: ids back to back, length of each document, and what it left out."""

    tokens: np.ndarray
    lengths: np.ndarray
    num_lines: int
    bad_records: list[tuple[int, str]]


@dataclass(frozen=True)
class Plan:
    """How each chunk is encoded; the same for all workers."""

    tokenizer: str
    eos_token: str | None
    json_key: str
    append_eod: bool
    vocab_size: int
    dtype: np.dtype


@dataclass
class Report:
    """What happened to the records, by file and line."""

    max_bad_records: int
    num_bad: int = 0
    first_bad: str = ""
    lines_before: dict[Path, int] = field(default_factory=dict)

    def add(self, chunk: Chunk, encoded: Encoded) -> None:
        """Count a chunk, in the order of the file; DataError once too many records were bad."""
        before = self.lines_before.get(chunk.path, 0)
        self.lines_before[chunk.path] = before + encoded.num_lines
        self.num_bad += len(encoded.bad_records)
        if encoded.bad_records and not self.first_bad:
            line, reason = encoded.bad_records[0]
            self.first_bad = f"{chunk.path} line {before + line}: {reason}"
        if self.num_bad > self.max_bad_records:
            limit = f"more than --max-bad-records {self.max_bad_records}"
            raise DataError(f"{self.first_bad} ({limit}: repair the input, or allow more)")


_worker_tokenizer: Tokenizer | None = None  # one for each worker process, loaded when it starts


def _start_worker(plan: Plan) -> None:
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    Thread(target=_exit_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one core
    _worker_tokenizer = load_tokenizer(plan.tokenizer, plan.eos_token)


def _exit_with_parent() -> None:
    """A parent that was killed cannot stop its workers; they would wait for work forever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_chunk(plan: Plan, chunk: Chunk) -> Encoded:
    assert _worker_tokenizer is not None
    found = read_documents(chunk, plan.json_key)
    names = [chunk.describe_line(line) for line in found.lines]
    how = (_worker_tokenizer, plan.dtype, plan.append_eod, plan.vocab_size)
    tokens, lengths = encode_documents(found.texts, *how, names)
    return Encoded(tokens, lengths, found.num_lines, found.bad_records)


def _encode_in_order(plan: Plan, chunks: Iterable[Chunk], workers: int) -> Iterator[tuple[Chunk, Encoded]]:
    """Chunks with their ids, in order; at most four chunks per worker are in flight, so memory stays flat."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (plan,))
    flying: deque[tuple[Chunk, Future[Encoded]]] = deque()
    try:
        for chunk in chunks:
            flying.append((chunk, pool.submit(partial(_encode_chunk, plan), chunk)))
            if len(flying) >= 4 * workers:
                done, future = flying.popleft()
                yield done, future.result()
        while flying:
            done, future = flying.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker process died: perhaps out of memory: lower --workers, or cut long lines"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def preprocess(
    plan: Plan, paths: list[Path], prefix: str, workers: int, report: Report
) -> tuple[int, int, float]:
    """Write the dataset; returns documents, tokens and seconds."""
    total = sum(path.stat().st_size for path in paths)
    with (
        IndexedDatasetWriter(prefix, plan.dtype) as writer,
        tqdm(total=total, desc="tokenize", unit="B", unit_scale=True) as bar,
    ):
        for chunk, encoded in _encode_in_order(plan, split_files(paths), workers):
            report.add(chunk, encoded)
            writer.add_documents(encoded.tokens, encoded.lengths)
            bar.update(chunk.num_bytes)
            rate = writer.num_tokens / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{writer.num_tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
        if writer.num_tokens == 0:
            raise DataError(f"no tokens in {len(paths)} input files: nothing was written")
        return writer.num_documents, writer.num_tokens, bar.format_dict["elapsed"]


def available_cores() -> int:
    """Cores that this process may use; a batch system may have left it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        type=Path,
        help="text files, in the order to write",
    )
    add("--output-prefix", required=True, metavar="P", help="path of the output, without _text_document.bin")
    add(
        "--tokenizer",
        required=True,
        metavar="T",
        help="Hugging Face folder, tokenizer.json, SentencePiece .model, or 'bytes' (257 ids, no file)",
    )
    add(
        "--json-key",
        default="text",
        metavar="KEY",
        help="key of the text in each JSON object (default: text)",
    )
    add("--append-eod", action="store_true", help="close each document with the tokenizer's end-of-text id")
    add("--eos-token", metavar="TOKEN", help="the end-of-text token, where the tokenizer does not name it")
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="vocabulary of the model to train: an id from N on is an error (default: the tokenizer's size)",
    )
    add(
        "--workers",
        type=int,
        default=available_cores(),
        metavar="N",
        help="processes, one core each (default: all)",
    )
    add(
        "--max-bad-records",
        type=int,
        default=0,
        metavar="N",
        help="JSON lines without readable text to leave out before giving up (default: 0)",
    )
    return parser


def plan_from(arguments: argparse.Namespace) -> Plan:
    """Check the arguments against each other and the tokenizer."""
    check_files(arguments.input)
    if arguments.workers < 1:
        raise DataError(f"--workers: expected at least 1, found {arguments.workers}")
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.eos_token)
    if arguments.append_eod:
        _ = tokenizer.eos_token_id  # raises when there is none
    vocab_size = tokenizer.vocab_size if arguments.vocab_size is None else arguments.vocab_size
    if vocab_size < 1:
        raise DataError(f"--vocab-size: expected at least 1, found {vocab_size}")
    names = (arguments.tokenizer, arguments.eos_token, arguments.json_key, arguments.append_eod)
    return Plan(*names, vocab_size, dtype_for(vocab_size))


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the dataset is written, 2 when the user can put it right."""
    arguments = build_parser().parse_args(argv)
    prefix = f"{arguments.output_prefix}_{arguments.json_key}_document"
    report = Report(arguments.max_bad_records)
    try:
        plan = plan_from(arguments)
        documents, tokens, seconds = preprocess(plan, arguments.input, prefix, arguments.workers, report)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted: nothing was written", file=sys.stderr)
        return 130
    if report.num_bad:
        print(f"left out {report.num_bad} bad records; the first: {report.first_bad}", file=sys.stderr)
    print(f"{prefix}: {documents:,} documents, {tokens:,} tokens of {plan.dtype}, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a polite kill cleans up as well
    sys.exit(main())
