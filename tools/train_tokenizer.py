"""Train a tokenizer on text and write a folder that megalite and transformers load."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from megalite.data.documents import check_files, read_documents, split_files
from megalite.data.error import DataError
from megalite.tokenizer.tokenizer import END_OF_TEXT, HuggingFaceTokenizer, load_tokenizer

EPILOG = """\
input:
  .jsonl .ndjson .json   one JSON object per line; its text is under --json-key
  any other text file    the whole file is one document

kinds:
  byte-bpe        GPT-2's: every text has ids. Id 0 is <|endoftext|>, then 256 bytes, then merges.
  sentencepiece   Llama-2's: SentencePiece BPE with byte fallback. Ids 0, 1, 2 are <unk>, <s>, </s>; </s> ends
                  a text. tokenizer.model is written as well.

example:
  python tools/train_tokenizer.py --input corpus.jsonl --output tokenizers/mine --vocab-size 4096
"""
MIN_VOCAB = {"byte-bpe": 257, "sentencepiece": 300}


def read_texts(paths: list[Path], json_key: str, max_bytes: int | None) -> Iterator[str]:
    """Documents of all files with progress, until `max_bytes` of input; a bad record is an error."""
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=min(total, max_bytes or total), desc="read", unit="B", unit_scale=True) as bar:
        for chunk in split_files(paths):
            if max_bytes is not None and bar.n >= max_bytes:
                return
            found = read_documents(chunk, json_key)
            if found.bad_records:
                line, reason = found.bad_records[0]
                raise DataError(f"{chunk.describe_line(line)}: {reason}")
            yield from found.texts
            bar.update(chunk.num_bytes)


def train_byte_bpe(texts: Iterator[str], vocab_size: int) -> HuggingFaceTokenizer:
    """Byte-level BPE with GPT-2's word pattern; <|endoftext|> is id 0."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=True,
    )
    backend.train_from_iterator(texts, trainer)
    return HuggingFaceTokenizer(backend, "byte-bpe", END_OF_TEXT)


def train_sentencepiece(texts: Iterator[str], vocab_size: int, model_file: Path) -> None:
    """SentencePiece BPE that keeps text as it is: not normalised, all spaces, bytes for rare characters."""
    import sentencepiece

    lines = (line for text in texts for line in text.splitlines(keepends=True) if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=lines,
            model_prefix=str(model_file.with_suffix("")),
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"sentencepiece could not train {vocab_size} ids: {reason}: try a smaller --vocab-size"
        ) from error


def train(arguments: argparse.Namespace) -> int:
    """Train, check and write; returns the size of the vocabulary."""
    check_files(arguments.input)
    smallest = MIN_VOCAB[arguments.kind]
    if arguments.vocab_size < smallest:
        raise DataError(
            f"--vocab-size: expected at least {smallest} for {arguments.kind}, found {arguments.vocab_size}"
        )
    texts = read_texts(arguments.input, arguments.json_key, arguments.max_bytes)
    output, maximum = arguments.output, {}
    if arguments.model_max_length is not None:
        maximum = {"model_max_length": arguments.model_max_length}
    if arguments.kind == "byte-bpe":
        tokenizer = train_byte_bpe(texts, arguments.vocab_size)
        tokenizer.save(output, **maximum)
        return tokenizer.vocab_size
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".training-") as folder:
        model_file = Path(folder, "tokenizer.model")
        train_sentencepiece(texts, arguments.vocab_size, model_file)
        load_tokenizer(model_file).save(output, **maximum)
        model_file.replace(output / "tokenizer.model")
        return arguments.vocab_size


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", type=Path, help="text files to learn from")
    add(
        "--output",
        required=True,
        metavar="DIR",
        type=Path,
        help="folder for tokenizer.json, tokenizer_config.json",
    )
    add("--vocab-size", type=int, required=True, metavar="N", help="ids, special tokens included")
    add("--kind", choices=sorted(MIN_VOCAB), default="byte-bpe", help="see below (default: byte-bpe)")
    add(
        "--json-key",
        default="text",
        metavar="KEY",
        help="key of the text in each JSON object (default: text)",
    )
    add(
        "--max-bytes", type=int, metavar="N", help="learn from the first N bytes of input only (default: all)"
    )
    add(
        "--model-max-length",
        type=int,
        metavar="N",
        help="context of the model in tokens, noted in the config",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the tokenizer is written, 2 when the user can put it right."""
    arguments = build_parser().parse_args(argv)
    try:
        vocab_size = train(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted: nothing was written", file=sys.stderr)
        return 130
    print(f"{arguments.output}: {arguments.kind} tokenizer with {vocab_size:,} ids")
    return 0


if __name__ == "__main__":
    sys.exit(main())
