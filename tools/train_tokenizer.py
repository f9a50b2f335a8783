"""Train a tokenizer on text and write a folder that megalite and transformers load."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from tqdm import tqdm

from megalite.data.error import DataError
from megalite.data.sources import Source, find_source
from megalite.tokenizer.load import load_tokenizer
from megalite.tokenizer.tokenizer import END_OF_TEXT, HuggingFaceTokenizer, Tokenizer

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
MIN_VOCAB = {"byte-bpe": 257, "lillm": 272, "sentencepiece-bpe": 300, "sentencepiece-unigram": 300}
LILLM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<r{index}>" for index in range(13))]
MAX_RECORD_BYTES = 1 << 26


def read_texts(sources: list[Source], json_key: str, max_bytes: int | None) -> Iterator[str]:
    """Documents of all inputs with progress, until `max_bytes` of input; a bad record is an error."""
    sizes = [source.num_bytes for source in sources]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    total = min(filter(None, (total, max_bytes)), default=None)
    blocks = (block for source in sources for block in source.blocks(MAX_RECORD_BYTES))
    with tqdm(total=total, desc="read", unit="B", unit_scale=True) as bar:
        for block in blocks:
            if max_bytes is not None and bar.n >= max_bytes:
                return
            found = block.read((json_key,), MAX_RECORD_BYTES)
            if found.bad_records:
                record, reason = found.bad_records[0]
                raise DataError(f"{block.describe(record)}: {reason}")
            yield from found.texts[0]
            bar.update(block.num_bytes)


def train_byte_bpe(texts: Iterator[str], vocab_size: int, special_tokens: list[str]) -> Backend:
    """Byte-level BPE with GPT-2's word pattern; the special tokens are the first ids."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=True,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def train_sentencepiece(texts: Iterator[str], vocab_size: int, kind: str, model_file: Path) -> None:
    """A SentencePiece model, "bpe" or "unigram", that keeps text as it is: all spaces, bytes for the rare."""
    import sentencepiece

    lines = (line for text in texts for line in text.splitlines(keepends=True) if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=lines,
            model_prefix=str(model_file.with_suffix("")),
            vocab_size=vocab_size,
            model_type=kind,
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


def build_tokenizer(kind: str, texts: Iterator[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Train; SentencePiece leaves its own model in `folder` where it is of use."""
    if kind == "byte-bpe":
        return HuggingFaceTokenizer(train_byte_bpe(texts, vocab_size, [END_OF_TEXT]), kind, END_OF_TEXT)
    if kind == "lillm":
        names = {"bos_token": "<s>", "unk_token": "<unk>"}
        return HuggingFaceTokenizer(train_byte_bpe(texts, vocab_size, LILLM_TOKENS), kind, "</s>", names)
    from megalite.tokenizer.spm import convert_unigram

    model_file = folder / "tokenizer.model"
    train_sentencepiece(texts, vocab_size, kind.removeprefix("sentencepiece-"), model_file)
    return load_tokenizer(model_file) if kind == "sentencepiece-bpe" else convert_unigram(model_file)


def train(arguments: argparse.Namespace) -> int:
    """Train, check and write; returns the size of the vocabulary."""
    sources = [find_source(name, (arguments.json_key,)) for name in arguments.input]
    smallest = MIN_VOCAB[arguments.kind]
    if arguments.vocab_size < smallest:
        raise DataError(
            f"--vocab-size: expected at least {smallest} for {arguments.kind}, found {arguments.vocab_size}"
        )
    texts = read_texts(sources, arguments.json_key, arguments.max_bytes)
    output, length = arguments.output, arguments.model_max_length
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".training-") as folder:
        tokenizer = build_tokenizer(arguments.kind, texts, arguments.vocab_size, Path(folder))
        tokenizer.save(output, **({} if length is None else {"model_max_length": length}))
        (output / "tokenizer.model").unlink(missing_ok=True)  # of another training
        if arguments.kind == "sentencepiece-bpe":
            Path(folder, "tokenizer.model").replace(output / "tokenizer.model")
    return tokenizer.vocab_size


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="INPUT", help="text to learn from, see below")
    add(
        "--output",
        required=True,
        metavar="DIR",
        type=Path,
        help="folder for tokenizer.json, tokenizer_config.json",
    )
    size = "ids, special tokens included (default: 8192)"
    add("--vocab-size", type=int, default=8192, metavar="N", help=size)
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
