"""Text to token ids and back: Hugging Face, SentencePiece or plain bytes behind one small interface."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from megalite.files import write_text, written_aside
from megalite.tokenizer.config_file import token_text
from megalite.tokenizer.error import TokenizerError

END_OF_TEXT = "<|endoftext|>"
MODEL_FILE = "tokenizer.model"
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

    def sentencepiece_model(self) -> bytes | None:
        """SentencePiece's own model of the same ids, where there is one."""
        return None

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

    def save(
        self,
        folder: str | Path,
        model_max_length: int = _UNLIMITED_TOKENS,
        chat_template: str | None = None,
    ) -> None:
        """Write tokenizer.json and tokenizer_config.json, from which `transformers.AutoTokenizer` loads.

        chat_template: the text of one in the place of the tokenizer's own.

        SentencePiece's model, where there is one, becomes tokenizer.model: only it has the scores of the
        pieces, which llama.cpp needs.
        """
        backend, model = self.to_backend(), self.sentencepiece_model()
        config = {
            **self.special_tokens(),
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model_max_length,
            "clean_up_tokenization_spaces": False,
        }
        if self.eos_token is not None:
            config["eos_token"] = self.eos_token
        if chat_template is not None:
            config["chat_template"] = chat_template
        config |= _added_around_text(backend, config)
        if model is not None:
            config |= _added_to_pieces(backend)
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text(Path(folder, "tokenizer.json"), backend.to_str(pretty=True))
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        write_text(Path(folder, "tokenizer_config.json"), text)
        if model is None:
            Path(folder, MODEL_FILE).unlink(missing_ok=True)  # of another tokenizer
            return
        with written_aside(Path(folder, MODEL_FILE), "wb") as file:
            file.write(model)


def _added_around_text(backend: Backend, config: dict[str, Any]) -> dict[str, bool]:
    """Whether tokenizer.json puts the tokens for begin and end around a text.

    transformers looks at tokenizer.json for it; llama.cpp, when nothing is said, begins every text of a
    SentencePiece model with <s>.
    """
    tokens = backend.encode("a").tokens
    bos, eos = (token_text(config.get(name)) for name in ("bos_token", "eos_token"))
    return {"add_bos_token": tokens[:1] == [bos], "add_eos_token": tokens[-1:] == [eos]}


def _added_to_pieces(backend: Backend) -> dict[str, Any]:
    """The tokens that were added to SentencePiece's pieces, where llama.cpp looks for them."""
    num_pieces = backend.get_vocab_size(with_added_tokens=False)
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {
        str(index): {flag: getattr(token, flag) for flag in flags}
        for index, token in sorted(backend.get_added_tokens_decoder().items())
        if index >= num_pieces
    }
    return {"added_tokens_decoder": added} if added else {}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer`; truncation and padding that its file may ask for are switched off.

    config: what its tokenizer_config.json says. model: the tokenizer.model that lies beside it.
    """

    def __init__(
        self,
        backend: Backend,
        name: str,
        eos_token: str | None,
        config: dict[str, Any] | None = None,
        model: bytes | None = None,
    ) -> None:
        self._backend, self._config, self._model = backend, config or {}, model
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

    def sentencepiece_model(self) -> bytes | None:
        if self._model is not None:
            from megalite.tokenizer.spm import check_same_pieces  # sentencepiece only where it is needed

            check_same_pieces(self._model, self._backend, self.name)
        return self._model

    def _content(self) -> bytes:
        return self._backend.to_str().encode()

    def special_tokens(self) -> dict[str, Any]:
        """Tokens as text alone: as objects transformers 5 takes them only with their `__type`."""
        names = ("bos_token", "pad_token", "unk_token")
        entries = {name: token_text(self._config.get(name)) for name in names}
        entries |= {name: self._config.get(name) for name in ("chat_template", "add_prefix_space")}
        return {name: value for name, value in entries.items() if value is not None}
