"""Text to token ids and back: Hugging Face, SentencePiece or plain bytes behind one small interface."""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from megalite.tokenizer.config_file import check_added_tokens, read_config, token_text
from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.hub import convert_with_transformers, download_tokenizer

__all__ = ["Tokenizer", "TokenizerError", "build_byte_tokenizer", "load_tokenizer"]

BYTES = "bytes"
END_OF_TEXT = "<|endoftext|>"
# Names by which a bare tokenizer.json may be asked for its end of text, when exactly one of them exists.
KNOWN_EOS_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>", "<|end|>")
_UNLIMITED_TOKENS = int(1e30)  # what transformers writes where no maximum is known


class Tokenizer(ABC):
    """The interface. No special token is ever added; `decode` shows them."""

    def __init__(self, name: str, eos_token: str | None) -> None:
        self.name, self.eos_token = name, eos_token
        self._eos_token_id: int | None = None
        if eos_token is not None:
            self._eos_token_id = self.token_to_id(eos_token)
            if self._eos_token_id is None:
                raise TokenizerError(
                    f"{name}: eos token {eos_token!r} is not in the vocabulary: name another"
                )

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Largest id + 1, added tokens included: every id is below it."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """Id of a token by its name in the vocabulary, or None."""

    @abstractmethod
    def _content(self) -> bytes:
        """All that decides which ids a text gets."""

    @abstractmethod
    def to_backend(self) -> Backend:
        """The same tokenizer as a `tokenizers.Tokenizer`, which tokenizer.json stores."""

    def special_tokens(self) -> dict[str, Any]:
        """Entries for tokenizer_config.json besides the end of text."""
        return {}

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self.encode_batch([text])[0]

    @property
    def eos_token_id(self) -> int:
        """Id that ends a document. Raises TokenizerError when the tokenizer names none."""
        if self._eos_token_id is None:
            raise TokenizerError(
                f"{self.name}: no end-of-text token is known: name it (eos_token, --eos-token)"
            )
        return self._eos_token_id

    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer and its end of text: equal only when ids are equal."""
        return hashlib.sha256(self._content() + str(self._eos_token_id).encode()).hexdigest()

    def save(self, folder: str | Path, model_max_length: int = _UNLIMITED_TOKENS) -> None:
        """Write tokenizer.json and tokenizer_config.json, from which `transformers.AutoTokenizer` loads."""
        config = {
            **self.special_tokens(),
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model_max_length,
            "clean_up_tokenization_spaces": False,
        }
        if self.eos_token is not None:
            config["eos_token"] = self.eos_token
        backend = self.to_backend()
        Path(folder).mkdir(parents=True, exist_ok=True)
        _write_text(Path(folder, "tokenizer.json"), backend.to_str(pretty=True))
        _write_text(
            Path(folder, "tokenizer_config.json"), json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        )


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`; truncation and padding that its file may ask for are switched off."""

    def __init__(
        self, backend: Backend, name: str, eos_token: str | None, config: dict[str, Any] | None = None
    ) -> None:
        self._backend, self._config = backend, config or {}
        backend.no_truncation()
        backend.no_padding()
        super().__init__(name, eos_token)

    @property
    def vocab_size(self) -> int:
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            encoding.ids
            for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def to_backend(self) -> Backend:
        return self._backend

    def _content(self) -> bytes:
        return self._backend.to_str().encode()

    def special_tokens(self) -> dict[str, Any]:
        names = ("bos_token", "pad_token", "unk_token", "chat_template")
        return {name: self._config[name] for name in names if self._config.get(name) is not None}


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
        from megalite.tokenizer.spm import SentencePieceTokenizer

        return SentencePieceTokenizer(file, eos_token)
    return _load_hugging_face(file, eos_token)


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
        names = ("tokenizer.json", "tokenizer.model")
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
    check_added_tokens(file, backend, config)
    named = eos_token or token_text(config.get("eos_token")) or _known_eos_token(backend)
    return HuggingFaceTokenizer(backend, str(file), named, config)


def _known_eos_token(backend: Backend) -> str | None:
    found = [token for token in KNOWN_EOS_TOKENS if backend.token_to_id(token) is not None]
    return found[0] if len(found) == 1 else None


def _write_text(path: Path, text: str) -> None:
    """Complete or absent: written aside, synced, renamed."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
