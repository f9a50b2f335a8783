"""A tokenizer from wherever it lies: a folder, a file, a Hub name, or built in."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from megalite.tokenizer.config_file import check_added_tokens, read_config, token_text
from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.hub import convert_with_transformers, download_tokenizer
from megalite.tokenizer.tokenizer import END_OF_TEXT, MODEL_FILE, HuggingFaceTokenizer, Tokenizer

BYTES = "bytes"
# Names by which a bare tokenizer.json may be asked for its end of text, when exactly one of them exists.
KNOWN_EOS_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>", "<|end|>")


def load_tokenizer(path: str | Path, eos_token: str | None = None) -> Tokenizer:
    """A tokenizer from a Hugging Face folder or name, a tokenizer.json, a SentencePiece .model, or "bytes".

    The end of text is `eos_token`, else what the folder's tokenizer_config.json or the SentencePiece model
    says; a bare tokenizer.json is searched for a well-known name. Without any, reading `eos_token_id` raises.
    A name is looked up on the Hub when no such file or folder is here.

    Raises TokenizerError when nothing loadable lies at `path`, or the end of text is not in the vocabulary.
    """
    if str(path) == BYTES and not Path(path).exists():
        return build_byte_tokenizer()
    place = Path(path) if Path(path).exists() else _download(str(path))
    file = _tokenizer_file(place)
    if file is None:
        backend, named = convert_with_transformers(place)
        return HuggingFaceTokenizer(backend, str(place), eos_token or named)
    if file.suffix == ".model":
        from megalite.tokenizer.spm import SentencePieceTokenizer  # sentencepiece only where it is needed

        return SentencePieceTokenizer(file.read_bytes(), str(file), eos_token)
    return _load_hugging_face(file, eos_token)


@dataclass(frozen=True)
class TokenizerPlace:
    """Where a tokenizer is found: small enough to be sent to each worker, which loads it."""

    path: str
    eos_token: str | None = None

    def load(self) -> Tokenizer:
        """Load it. Raises as `load_tokenizer`."""
        return load_tokenizer(self.path, self.eos_token)


def build_byte_tokenizer() -> Tokenizer:
    """Byte-level BPE without merges: ids 0 to 255 are the bytes of UTF-8 text, 256 is <|endoftext|>."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return HuggingFaceTokenizer(backend, BYTES, END_OF_TEXT)


def _byte_alphabet() -> list[str]:
    """GPT-2's stand-in for each byte: itself where it prints, else the next character from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + hidden.index(byte)) for byte in range(256)]


def _download(name: str) -> Path:
    """From the Hub, where it can be a name there: at most one slash, and no ending of a tokenizer file."""
    if name.count("/") > 1 or name.endswith((".json", ".model")) or name[:1] in ("/", ".", "~"):
        remedy = (
            f"expected a folder, a tokenizer.json, a SentencePiece .model, {BYTES!r} or a name on the Hub"
        )
        raise TokenizerError(f"{name}: no such file or folder: {remedy}")
    return download_tokenizer(name)


def _tokenizer_file(path: Path) -> Path | None:
    """The file to load: `path` itself, or what the folder holds; None when that is neither of the two."""
    if path.is_dir():
        names = ("tokenizer.json", MODEL_FILE)
        return next((path / name for name in names if (path / name).is_file()), None)
    if path.suffix not in (".json", ".model"):
        raise TokenizerError(
            f"{path}: expected a tokenizer.json or a SentencePiece .model, found {path.suffix!r}"
        )
    return path


def _load_hugging_face(file: Path, eos_token: str | None) -> Tokenizer:
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # tokenizers raises Exception itself
        reason = str(error).splitlines()[0]
        raise TokenizerError(f"{file}: not a tokenizer.json that tokenizers reads: {reason}") from error
    config = read_config(file.with_name("tokenizer_config.json"))
    template = file.with_name("chat_template.jinja")  # where transformers 5 writes it
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    check_added_tokens(file, backend, config)
    named = eos_token or token_text(config.get("eos_token")) or _known_eos_token(backend)
    model = file.with_name(MODEL_FILE)
    content = model.read_bytes() if model.is_file() else None
    return HuggingFaceTokenizer(backend, str(file), named, config, content)


def _known_eos_token(backend: Backend) -> str | None:
    found = [token for token in KNOWN_EOS_TOKENS if backend.token_to_id(token) is not None]
    return found[0] if len(found) == 1 else None
