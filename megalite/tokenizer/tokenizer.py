"""Text to token ids and back: Hugging Face, SentencePiece or plain bytes behind one small interface."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from megalite.files import write_text
from megalite.tokenizer.chat import render_chat
from megalite.tokenizer.error import TokenizerError

END_OF_TEXT = "<|endoftext|>"
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

    def chat_prompt(self, message: str) -> str:
        """The text that a chat model continues with its answer to a user's message.

        Raises TokenizerError when there is no chat template, or it does not take such a message.
        """
        raise TokenizerError(f"{self.name} has no chat template: name a tokenizer that has one (--tokenizer)")

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
        write_text(Path(folder, "tokenizer.json"), backend.to_str(pretty=True))
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        write_text(Path(folder, "tokenizer_config.json"), text)


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

    def chat_prompt(self, message: str) -> str:
        if not self._config.get("chat_template"):
            return super().chat_prompt(message)
        config = self.special_tokens() | {"eos_token": self.eos_token}
        return render_chat(self.name, self._backend, config, message)

    def _content(self) -> bytes:
        return self._backend.to_str().encode()

    def special_tokens(self) -> dict[str, Any]:
        names = ("bos_token", "pad_token", "unk_token", "chat_template")
        return {name: self._config[name] for name in names if self._config.get(name) is not None}
