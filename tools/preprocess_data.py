"""Text to Megatron token files: JSON lines, Parquet, plain text or any dataset in, .bin and .idx out."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from megalite.data.encoding import EncodingPlan
from megalite.data.error import DataError
from megalite.data.indexed_dataset import bin_path
from megalite.data.indexed_writer import dtype_for
from megalite.data.preprocess import BadRecords, Job, preprocess
from megalite.data.sources import find_source
from megalite.error import run_command
from megalite.files import left_aside
from megalite.tokenizer.load import TokenizerPlace, load_tokenizer

EPILOG = """\
input:
  .jsonl .ndjson .json   one JSON object per line, each a document; its text is under --json-key
  .parquet               one document per row; its text is in the column --json-key
  a folder, hf:NAME      what the `datasets` library finds there: rows as in Parquet, streamed
  any other file         text; the whole file is one document
  JSON lines and text may be compressed: .gz .zst .bz2. All text is UTF-8. Documents keep the order of the
  inputs and of their lines, whatever --workers is. A record that cannot be read stops the run, or is left out
  and counted, see --max-bad-records.

output:
  P_text_document.bin and P_text_document.idx, for --output-prefix P and --json-key text; a pair for each key.
  Train on them with data.train=[P_text_document]. Ids are uint16 for vocabularies below 65,500, else int32.
  An existing pair is replaced when the new one is complete. An interrupted run writes nothing; the next one
  starts from the beginning.

examples:
  python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \\
         --tokenizer bytes --append-eod
  python tools/preprocess_data.py --input part-*.jsonl.zst --output-prefix data/corpus \\
         --tokenizer tokenizers/mine --append-eod --workers 16 --max-bad-records 100
  python tools/preprocess_data.py --input hf:roneneldan/TinyStories --output-prefix data/stories \\
         --tokenizer gpt2 --append-eod
"""


def keep_workers_single_threaded() -> None:
    """A worker is one core; and with one thread only, `tokenizers` allocates memory without locks."""
    threads = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    os.environ.update(dict.fromkeys(threads, "1"), TOKENIZERS_PARALLELISM="false")


def report_leftovers(prefixes: Sequence[str]) -> None:
    """Say so when an earlier run was cut off: what it wrote cannot be used."""
    for prefix in prefixes:
        for left in left_aside(bin_path(prefix)):
            found = f"{left}: left by a run that was killed, or one that still writes here"
            print(
                f"{found}: this run starts from the beginning; delete the file if none runs", file=sys.stderr
            )


def available_cores() -> int:
    """Cores that this process may use; a batch system may have left it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    inputs = "files, folders or hf:NAME, in the order to write"
    add("--input", nargs="+", required=True, metavar="INPUT", help=inputs)
    add("--output-prefix", required=True, metavar="P", help="path of the output, without _text_document.bin")
    tokenizer = "Hugging Face folder or name, tokenizer.json, SentencePiece .model, or 'bytes' (257 ids)"
    add("--tokenizer", required=True, metavar="T", help=tokenizer)
    keys = "keys (or columns) of the text; each gives a dataset of its own (default: text)"
    add("--json-key", nargs="+", default=["text"], metavar="KEY", help=keys)
    add("--append-eod", action="store_true", help="close each document with the tokenizer's end-of-text id")
    add("--eos-token", metavar="TOKEN", help="the end-of-text token, where the tokenizer does not name it")
    size = "vocabulary of the model to train: an id from N on is an error (default: the tokenizer's size)"
    add("--vocab-size", type=int, metavar="N", help=size)
    cores = available_cores()
    processes = f"processes, one core each; 0: only this one (default: {cores}, all here)"
    add("--workers", type=int, default=cores, metavar="N", help=processes)
    bad = "records without readable text to leave out before giving up (default: 0)"
    add("--max-bad-records", type=int, default=0, metavar="N", help=bad)
    large = "a larger record is a bad one: encoding needs about 150 times its size in memory (default: 16)"
    add("--max-record-mib", type=int, default=16, metavar="N", help=large)
    add("--dataset-config", metavar="NAME", help="for a folder or hf:NAME: its configuration, if it has many")
    add("--dataset-split", default="train", metavar="NAME", help="for a folder or hf:NAME (default: train)")
    return parser


def job_from(arguments: argparse.Namespace) -> Job:
    """Check the arguments against each other, the tokenizer and the inputs."""
    for name, least in (("workers", 0), ("max_record_mib", 1), ("max_bad_records", 0)):
        if (found := getattr(arguments, name)) < least:
            raise DataError(f"--{name.replace('_', '-')}: expected at least {least}, found {found}")
    keys = tuple(dict.fromkeys(arguments.json_key))
    tokenizer = load_tokenizer(arguments.tokenizer, arguments.eos_token)
    place = TokenizerPlace(tokenizer.name, arguments.eos_token)
    if arguments.append_eod:
        _ = tokenizer.eos_token_id  # raises when there is none
    vocab_size = tokenizer.vocab_size if arguments.vocab_size is None else arguments.vocab_size
    if vocab_size < 1:
        raise DataError(f"--vocab-size: expected at least 1, found {vocab_size}")
    limits = (arguments.append_eod, vocab_size, dtype_for(vocab_size), arguments.max_record_mib << 20)
    where = (arguments.dataset_config, arguments.dataset_split)
    return Job(
        EncodingPlan(place, keys, *limits),
        [find_source(name, keys, *where) for name in arguments.input],
        [f"{arguments.output_prefix}_{key}_document" for key in keys],
        arguments.workers,
        BadRecords(arguments.max_bad_records),
    )


def write(arguments: argparse.Namespace) -> None:
    """Do what the arguments ask for, and say what was written."""
    keep_workers_single_threaded()
    job = job_from(arguments)
    report_leftovers(job.prefixes)
    writers = preprocess(job, progress=True)
    bad = job.bad_records
    if bad.count:
        print(f"left out {bad.count:,} bad records; the first: {bad.first}", file=sys.stderr)
    for writer in writers:
        print(writer.summary())


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the data is written, 2 when the user can put it right."""
    arguments = build_parser().parse_args(argv)
    kept = "nothing was written, a new run starts from the beginning"
    return run_command(lambda: write(arguments), interrupted=kept)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a polite kill cleans up as well
    sys.exit(main())
