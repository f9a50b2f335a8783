"""Token files of other projects to Megatron token files: nothing is tokenized again."""

import argparse
import signal
import sys
from pathlib import Path

from tqdm import tqdm

from megalite.data.error import DataError
from megalite.data.foreign import (
    EOS_POSITIONS,
    FORMATS,
    ID_TYPES,
    Boundaries,
    Pieces,
    check_pieces,
    read_datatrove,
    read_flat,
    read_llmc,
)
from megalite.data.indexed_writer import IndexedDatasetWriter, dtype_for
from megalite.error import run_command

EPILOG = """\
formats:
  flat        raw uint16 or uint32 ids: nanoGPT, lilLM (.bin), OLMo (.npy). Needs --dtype, --eos-position.
  llmc        llm.c's .bin. Needs --eos-position; llm.c itself puts the id at the start of each document.
  datatrove   FILE.ds with FILE.ds.index beside it. --dtype only where FILE.ds.metadata is missing.

Flat and llm.c files do not say where documents begin and end: say which id is the end of text, and whether
it stands at the end or at the start of each document. With --eos-position none each file is one document. All
ids stay, the end-of-text id too. Files are joined in their order; a document never spans two of them, and one
of more than 16,777,216 tokens is stored as several sequences. The source is not changed. Compressed files are
refused.

examples:
  python tools/import_tokens.py --format flat --dtype uint16 --eos-token-id 50256 --eos-position end \\
         --vocab-size 50257 --input nanogpt/train.bin --output-prefix data/openwebtext
  python tools/import_tokens.py --format datatrove --vocab-size 50257 --input *.ds --output-prefix data/web
"""
SEQUENCE_TOKENS = 1 << 24


def open_pieces(path: Path, arguments: argparse.Namespace) -> Pieces:
    """Documents of one file, as the arguments say it is to be read."""
    dtype = ID_TYPES[arguments.dtype] if arguments.dtype else None
    if arguments.format == "datatrove":
        return read_datatrove(path, dtype)
    boundaries = Boundaries(arguments.eos_position, arguments.eos_token_id)
    if arguments.format == "llmc":
        return read_llmc(path, boundaries)
    assert dtype is not None
    return read_flat(path, dtype, boundaries)


def check(arguments: argparse.Namespace) -> None:
    """Raise DataError for arguments that do not fit the format."""
    if arguments.vocab_size < 1:
        raise DataError(f"--vocab-size: expected at least 1, found {arguments.vocab_size}")
    if arguments.format == "flat" and arguments.dtype is None:
        raise DataError("--dtype: expected uint16 or uint32 for flat files, found nothing")
    if arguments.format == "llmc" and arguments.dtype is not None:
        raise DataError(f"--dtype: expected none, as llm.c files state it, found {arguments.dtype}")
    named = arguments.eos_position or arguments.eos_token_id
    if arguments.format == "datatrove" and named is not None:
        raise DataError("--eos-position and --eos-token-id: expected none: FILE.ds.index has the documents")
    if arguments.format != "datatrove" and arguments.eos_position is None:
        raise DataError(f"--eos-position: expected end, start or none for {arguments.format}, found nothing")


def import_tokens(arguments: argparse.Namespace) -> IndexedDatasetWriter:
    """Write one dataset of all files; returns its writer, with what it counted."""
    check(arguments)
    total = sum(path.stat().st_size for path in arguments.input if path.is_file())
    dtype = dtype_for(arguments.vocab_size)
    with (
        IndexedDatasetWriter(arguments.output_prefix, dtype) as writer,
        tqdm(total=total, desc="import", unit="B", unit_scale=True) as bar,
    ):
        for path in arguments.input:
            for tokens, lengths in check_pieces(path, open_pieces(path, arguments), arguments.vocab_size):
                if len(lengths) == 1:  # perhaps a whole file
                    parts = range(0, len(tokens), SEQUENCE_TOKENS)
                    writer.add_document(tokens[start : start + SEQUENCE_TOKENS] for start in parts)
                else:
                    writer.add_documents(tokens, lengths)
                bar.update(tokens.nbytes)
    return writer


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    add("--format", choices=FORMATS, required=True, help="what the files are, see below")
    files = "token files, in the order to write"
    add("--input", nargs="+", type=Path, required=True, metavar="FILE", help=files)
    output = "writes P.bin and P.idx; train with data.train=[P]"
    add("--output-prefix", required=True, metavar="P", help=output)
    size = "vocabulary of the tokenizer that made the ids: an id from N on is an error"
    add("--vocab-size", type=int, required=True, metavar="N", help=size)
    add("--dtype", choices=sorted(ID_TYPES), help="type of the ids, where the files do not say it")
    add("--eos-token-id", type=int, metavar="ID", help="the end-of-text id between documents")
    add("--eos-position", choices=EOS_POSITIONS, help="where it stands: document's end or start, or nowhere")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the data is written, 2 when the user can put it right."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: print(import_tokens(arguments).summary()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a polite kill cleans up as well
    sys.exit(main())
