"""Train a tokenizer on text and write a folder that megalite and transformers load."""

import argparse
import sys
from pathlib import Path

from megalite.data.sources import find_source, read_texts
from megalite.error import run_command
from megalite.tokenizer.train import MIN_VOCAB, train_tokenizer

EPILOG = """\
input: as for tools/preprocess_data.py
  .jsonl .ndjson .json   one JSON object per line; its text is under --json-key
  .parquet, a folder     rows; the text is in the column --json-key
  hf:NAME                a dataset on the Hugging Face Hub
  any other file         text; the whole file is one document (.gz .zst .bz2 are unpacked)

kinds:
  byte-bpe               GPT-2's: every text has ids. Id 0 is <|endoftext|>, then 256 bytes, then merges.
  lillm                  lilLM's: as byte-bpe, but ids 0, 1, 2 are <unk>, <s>, </s>, and 3 to 15 are reserved
                         (<r0> to <r12>); </s> ends a text.
  sentencepiece-bpe      Llama-2's: SentencePiece BPE with byte fallback. Ids 0, 1, 2 are <unk>, <s>, </s>;
                         </s> ends a text. tokenizer.model is written as well.
  sentencepiece-unigram  the same with SentencePiece's unigram model, written as tokenizer.json only

example:
  python tools/train_tokenizer.py --input corpus.jsonl --output tokenizers/mine --vocab-size 8192
"""


def train(arguments: argparse.Namespace) -> None:
    """Train, write, and say what was written."""
    sources = [find_source(name, (arguments.json_key,)) for name in arguments.input]
    texts = read_texts(sources, arguments.json_key, arguments.max_bytes)
    where = (arguments.output, arguments.model_max_length)
    tokenizer = train_tokenizer(arguments.kind, texts, arguments.vocab_size, *where)
    print(f"{arguments.output}: {arguments.kind} tokenizer with {tokenizer.vocab_size:,} ids")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="INPUT", help="text to learn from, see below")
    folder = "folder for tokenizer.json, tokenizer_config.json"
    add("--output", required=True, metavar="DIR", type=Path, help=folder)
    size = "ids, special tokens included (default: 8192)"
    add("--vocab-size", type=int, default=8192, metavar="N", help=size)
    add("--kind", choices=sorted(MIN_VOCAB), default="byte-bpe", help="see below (default: byte-bpe)")
    key = "key of the text in each JSON object (default: text)"
    add("--json-key", default="text", metavar="KEY", help=key)
    first = "learn from the first N bytes of input only (default: all)"
    add("--max-bytes", type=int, metavar="N", help=first)
    context = "context of the model in tokens, noted in the config"
    add("--model-max-length", type=int, metavar="N", help=context)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the tokenizer is written, 2 when the user can put it right."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: train(arguments))


if __name__ == "__main__":
    sys.exit(main())
