"""A model that writes on, token by token, until its texts are complete."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from megalite.config.model import ModelConfig
from megalite.generation.printer import Printer
from megalite.model.decoding import decode
from megalite.model.llama import LlamaStage
from megalite.model.sampling import Sampling
from megalite.tokenizer.continuation import Continuation
from megalite.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Writer:
    """How a model is asked to write.

    Attributes:
        stage: the model, or this process's part of it.
        sampling, generator: how tokens are drawn.
        end_tokens, stop_texts: what completes a text and is not shown.
    """

    stage: LlamaStage
    tokenizer: Tokenizer
    sampling: Sampling
    generator: torch.Generator
    max_new_tokens: int
    end_tokens: Collection[int]
    stop_texts: Sequence[str]

    def write(self, prompts: Sequence[Sequence[int]], printer: Printer) -> list[Continuation]:
        """What comes after each prompt, given as token ids; the printer sees it as it is made."""
        texts = [Continuation(self.tokenizer, self.end_tokens, self.stop_texts) for _ in prompts]
        for tokens in decode(self.stage, prompts, self.max_new_tokens, self.sampling, self.generator):
            for text, token in zip(texts, tokens, strict=True):
                text.add(token)
            printer.show(texts)
            if all(text.is_complete for text in texts):
                break
        printer.finish(texts)
        return texts

    def write_all(self, prompts: Sequence[Sequence[int]], printer: Printer, batch_size: int) -> None:
        """The same for any number of prompts, so many at once."""
        for first in range(0, len(prompts), batch_size):
            self.write(prompts[first : first + batch_size], printer)


def end_tokens(model: ModelConfig, tokenizer: Tokenizer) -> set[int]:
    """What ends a text: the model's own end of text, else its tokenizer's."""
    if model.eos_token_id is not None:
        return {model.eos_token_id}
    return set() if tokenizer.eos_token is None else {tokenizer.eos_token_id}
