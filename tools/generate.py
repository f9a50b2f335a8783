"""Continue a prompt with the model of a checkpoint."""

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.load import PLACES, read_config, require_checkpoint
from megalite.checkpoint.model import build_transformers_model
from megalite.checkpoint.weights import DTYPES, Weights
from megalite.config.model import ModelConfig
from megalite.error import UserError, run_command
from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.load import load_tokenizer
from megalite.tokenizer.tokenizer import Tokenizer

EPILOG = """\
The text appears as it is made, on standard output. An empty prompt begins a new document.

example:
  python tools/generate.py --checkpoint runs/default/checkpoints --prompt "def main(" --max-new-tokens 100
"""


class PromptError(UserError):
    """A prompt that the model cannot continue."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: generate(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    where = f"{PLACES}; of several the newest valid one"
    add("--checkpoint", type=Path, required=True, help=where)
    add("--prompt", required=True, help="text to continue")
    most = "most tokens to add (default: %(default)s)"
    add("--max-new-tokens", type=positive(int), default=64, help=most)
    heat = "0 takes the likeliest token each time, 1 draws as the model says (default: %(default)s)"
    add("--temperature", type=positive(float, zero=True), default=0.8, help=heat)
    add("--seed", type=int, default=1234, help="of the draws (default: %(default)s)")
    add("--tokenizer", help="folder, file or 'bytes' (default: the run's data.tokenizer)")
    add("--dtype", choices=DTYPES, default="float32", help="to compute in (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="default here: %(default)s")
    return parser


def positive(kind: type[int] | type[float], zero: bool = False) -> Callable[[str], float]:
    """An argparse type: a number above zero, or with `zero` not below it."""

    def parse(text: str) -> float:
        value: float = -1
        with contextlib.suppress(ValueError):
            value = kind(text)
        if not (0 < value < float("inf") or (zero and value == 0)):
            noun = "whole number" if kind is int else "number"
            limit = "of at least 0" if zero else "above 0"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} {limit}")
        return value

    return parse


def generate(arguments: argparse.Namespace) -> None:
    """Read the model and its tokenizer, and print the continuation."""
    checkpoint = require_checkpoint(arguments.checkpoint, lambda line: print(line, file=sys.stderr))
    run = read_config(checkpoint)
    name = arguments.tokenizer or run.data.tokenizer
    if name is None:
        raise TokenizerError(f"the run of {checkpoint} names no tokenizer: name it with --tokenizer")
    tokenizer = load_tokenizer(name)
    prompt = encode_prompt(arguments.prompt, tokenizer, run.model, arguments.max_new_tokens)
    end = run.model.eos_token_id
    if end is None and tokenizer.eos_token is not None:
        end = tokenizer.eos_token_id
    model = build_transformers_model(Weights(checkpoint, run.model, arguments.dtype)).to(arguments.device)
    torch.manual_seed(arguments.seed)
    tokens = torch.tensor([prompt], device=arguments.device)
    model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=arguments.max_new_tokens,
        eos_token_id=end,
        pad_token_id=end,
        streamer=Printer(tokenizer, end),
        **draw_options(arguments.temperature),
    )


def draw_options(temperature: float) -> dict[str, Any]:
    """What transformers' `generate` needs to draw; top_k 0: all tokens take part, its default is 50."""
    if not temperature:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": 0}


def encode_prompt(text: str, tokenizer: Tokenizer, model: ModelConfig, max_new_tokens: int) -> list[int]:
    """Token ids of the prompt. Raises PromptError when they and the new ones do not fit into the context."""
    tokens = tokenizer.encode(text) or [tokenizer.eos_token_id]
    if max(tokens) >= model.vocab_size:
        raise PromptError(
            f"tokenizer {tokenizer.name} gives id {max(tokens)} and the model has {model.vocab_size}: "
            "name the one that it was trained with (--tokenizer)"
        )
    if len(tokens) + max_new_tokens > model.max_position_embeddings:
        raise PromptError(
            f"prompt of {len(tokens)} tokens and --max-new-tokens {max_new_tokens} exceed the model's "
            f"max_position_embeddings {model.max_position_embeddings}: shorten one"
        )
    return tokens


class Printer:
    """A transformers streamer that prints text as soon as its characters are whole."""

    def __init__(self, tokenizer: Tokenizer, end_of_text: int | None) -> None:
        self.tokenizer, self.end_of_text = tokenizer, end_of_text
        self.tokens: list[int] | None = None  # None until the prompt has passed
        self.printed = ""

    def put(self, tokens: torch.Tensor) -> None:
        """New tokens [n]; the first call brings the prompt [1, n]."""
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens += [token for token in tokens.tolist() if token != self.end_of_text]
        text = self.tokenizer.decode(self.tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the first bytes of a character
            self._print(text)

    def end(self) -> None:
        """Called once, after the last token."""
        self._print(self.tokenizer.decode(self.tokens or []))
        print()

    def _print(self, text: str) -> None:
        print(text[len(self.printed) :], end="", flush=True)
        self.printed = text


if __name__ == "__main__":
    sys.exit(main())
