"""Tokenizers by another road: names on the Hugging Face Hub, and folders that only transformers reads."""

from pathlib import Path

from tokenizers import Tokenizer as Backend

from megalite.tokenizer.error import TokenizerError

_FILES = ["tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "config.json"]


def download_tokenizer(name: str) -> Path:
    """The folder with the tokenizer of `owner/name` or `name`; from the local cache when it is there.

    Raises TokenizerError when the Hub has no such name or cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # each way to fail has its own class, not all of them public
        reason = " ".join(str(error).split())[:200]
        expected = (
            "a folder, a tokenizer.json, a SentencePiece .model, 'bytes' or a name on the Hugging Face Hub"
        )
        raise TokenizerError(
            f"{name}: no such file or folder, and not to be had from the Hub: expected {expected}: {reason}"
        ) from error


def convert_with_transformers(folder: Path) -> tuple[Backend, str | None]:
    """The tokenizer of a folder with, say, vocab.json and merges.txt, and its end of text."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return loaded.backend_tokenizer, loaded.eos_token
    except Exception as error:  # of any class
        reason = " ".join(str(error).split())[:200]
        found = (
            f"no tokenizer.json or tokenizer.model in this folder, nor one that transformers reads: {reason}"
        )
        raise TokenizerError(f"{folder}: {found}") from error
