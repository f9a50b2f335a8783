"""The prompts of a command line or of standard input, as token ids that a model can continue."""

from collections.abc import Sequence
from typing import TextIO

from megalite.config.model import ModelConfig
from megalite.generation.error import PromptError

STDIN = "-"


def read_prompts(given: Sequence[str], stream: TextIO) -> list[str]:
    """The prompts, with the lines of a stream in the place of "-". PromptError when there are none."""
    prompts: list[str] = []
    for text in given:
        prompts += stream.read().splitlines() if text == STDIN else [text]
    if not prompts:
        raise PromptError("no prompt on standard input: write one a line")
    return prompts


def check_prompt(tokens: list[int], tokenizer: str, model: ModelConfig, max_new_tokens: int) -> list[int]:
    """The tokens. Raises PromptError when they and the new ones do not fit into the model's context.

    tokenizer: its name, for messages.
    """
    check_ids(tokens, tokenizer, model)
    if len(tokens) + max_new_tokens > model.max_position_embeddings:
        raise PromptError(
            f"prompt of {len(tokens)} tokens and --max-new-tokens {max_new_tokens} exceed the model's "
            f"max_position_embeddings {model.max_position_embeddings}: shorten one"
        )
    return tokens


def check_ids(tokens: Sequence[int], tokenizer: str, model: ModelConfig) -> None:
    """Raise PromptError for an id that the model does not have."""
    if max(tokens) >= model.vocab_size:
        raise PromptError(
            f"tokenizer {tokenizer} gives id {max(tokens)} and the model has {model.vocab_size}: "
            "name the one that it was trained with (--tokenizer)"
        )
