"""tokenizer_config.json: what transformers notes beside a tokenizer.json."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from megalite.tokenizer.error import TokenizerError


def read_config(path: Path) -> dict[str, Any]:
    """What the file says, {} when there is none. Raises TokenizerError when it is not such a file."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(config).__name__}")
    for key, kind in (("eos_token", str | dict), ("added_tokens_decoder", dict)):
        if not isinstance(config.get(key), kind | None):
            raise TokenizerError(f"{path}: {key}: found {type(config[key]).__name__}, which it cannot be")
    return config


def check_added_tokens(file: Path, backend: Backend, config: dict[str, Any]) -> None:
    """The config may list added tokens as well; TokenizerError when the two files disagree on an id."""
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        content = token_text(token)
        found = None if content is None else backend.token_to_id(content)
        if str(found) != str(index):
            expected = f"token {content!r} with id {index} as in tokenizer_config.json, found id {found}"
            raise TokenizerError(f"{file}: expected {expected}: the files are of different tokenizers")


def token_text(token: object) -> str | None:
    """A token is written as text, or as an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
