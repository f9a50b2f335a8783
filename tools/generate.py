"""Continue prompts with the model of a checkpoint, on one device or cut over several."""

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megalite.checkpoint.agreement import Gather, alone, on_all_ranks
from megalite.checkpoint.load import PLACES, read_config, require_checkpoint
from megalite.checkpoint.model import load_stage
from megalite.checkpoint.weights import DTYPES
from megalite.config.model import ModelConfig
from megalite.error import UserError, run_command
from megalite.model.decoding import decode, decoding_context
from megalite.model.llama import LlamaStage
from megalite.model.sampling import Sampling
from megalite.parallel.plan import LayerPlan
from megalite.tokenizer.continuation import Continuation
from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.load import load_tokenizer
from megalite.tokenizer.tokenizer import Tokenizer
from megalite.training.command import end
from megalite.training.environment import Environment, choose_cpu_accelerator, is_one_of_many
from megalite.training.processes import run_job
from megalite.training.world import gather

EPILOG = """\
The text of one prompt appears as it is made, on standard output; that of several when it is complete, each
below a line with its prompt. An empty prompt begins a new document. Under deepspeed or torchrun every layer
is cut over all processes (tensor parallel), each of which reads and holds its part of the weights alone.

examples:
  python tools/generate.py --checkpoint runs/default --prompt "def main(" --max-new-tokens 100
  python tools/generate.py --checkpoint runs/default --prompt - --stop "\\n\\n" --temperature 0 < prompts.txt
  deepspeed --num_gpus 2 tools/generate.py --checkpoint runs/default --prompt "def main("
"""
STDIN = "-"


class PromptError(UserError):
    """A prompt that the model cannot continue."""


@dataclass(frozen=True)
class Place:
    """This process among those that share the model."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    gather: Gather = alone

    @property
    def is_first(self) -> bool:
        """Whether it is the one that reads and prints."""
        return self.rank == 0


# The command line


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    return run_command(partial(start, argv), interrupted="the text is not complete")


def start(argv: list[str] | None) -> None:
    """Generate here, or with the other processes of a launch."""
    if not is_one_of_many():
        arguments = build_parser().parse_args(argv)
        return generate(arguments, Place(arguments.device))
    environment = Environment.read()
    rank, world_size = environment.rank, environment.world_size
    arguments = parse_on_rank(argv, rank)
    if arguments.device.index is not None:
        raise UserError(f"--device {arguments.device} under a launcher, which gives each process its own")
    if arguments.device.type == "cpu":
        choose_cpu_accelerator()
    run_job(environment, lambda device: generate(arguments, Place(device, rank, world_size, gather)))


def parse_on_rank(argv: list[str] | None, rank: int) -> argparse.Namespace:
    """The arguments; one rank speaks of mistakes for all, since all find the same."""
    if rank == 0:
        return build_parser().parse_args(argv)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return build_parser().parse_args(argv)
    except SystemExit:
        time.sleep(5)  # a launcher ends all ranks when the first one leaves
        raise


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    where = f"{PLACES}; of several the newest valid one"
    add("--checkpoint", type=Path, required=True, help=where)
    text = "text to continue, may be repeated; - reads one a line from standard input"
    add("--prompt", action="append", required=True, help=text)
    add("--chat", action="store_true", help="prompts are messages of a user, for the chat template to frame")
    ending = "text that ends a continuation and is not shown, with \\n for a new line; may be repeated"
    add("--stop", action="append", default=[], type=stop_text, metavar="TEXT", help=ending)
    most = "most tokens to add (default: %(default)s)"
    add("--max-new-tokens", type=number(int, above=0), default=64, help=most)
    together = "prompts that are continued at once (default: %(default)s)"
    add("--batch-size", type=number(int, above=0), default=8, help=together)
    add_drawing(parser)
    add("--tokenizer", help="folder, file or 'bytes' (default: the run's data.tokenizer)")
    add("--dtype", choices=DTYPES, default="float32", help="to compute in (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device_here, default=device, help="default here: %(default)s")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen."""
    add = parser.add_argument
    heat = "0 takes the likeliest token each time, 1 draws as the model says (default: %(default)s)"
    add("--temperature", type=number(float, at_least=0), default=0.8, help=heat)
    likeliest = "draw among so many likeliest tokens; 0 stands for all (default: %(default)s)"
    add("--top-k", type=number(int, at_least=0), default=0, help=likeliest)
    share = "draw among the likeliest tokens that have this probability together (default: %(default)s)"
    add("--top-p", type=number(float, above=0, at_most=1), default=1.0, help=share)
    add("--seed", type=number(int, at_least=0), default=1234, help="of the draws (default: %(default)s)")


def number(
    kind: type[int] | type[float],
    *,
    above: float = float("-inf"),
    at_least: float = float("-inf"),
    at_most: float = float("inf"),
) -> Callable[[str], float]:
    """An argparse type: a finite number within bounds."""
    bounds = [f"above {above:g}"] if above > float("-inf") else []
    bounds += [f"of at least {at_least:g}"] if at_least > float("-inf") else []
    bounds += [f"of at most {at_most:g}"] if at_most < float("inf") else []

    def parse(text: str) -> float:
        value = float("nan")
        with contextlib.suppress(ValueError):
            value = kind(text)
        if not (above < value < float("inf") and at_least <= value <= at_most):
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} {' and '.join(bounds)}")
        return value

    return parse


def stop_text(text: str) -> str:
    """An argparse type: a text that is there, with \\n and \\t as in Python."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text stands everywhere: write what ends a continuation")
    return text.replace("\\n", "\n").replace("\\t", "\t")


def device_here(text: str) -> torch.device:
    """An argparse type: a device of this machine."""
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} is not a device of this machine: {reason}") from None
    return device


# The work


def generate(arguments: argparse.Namespace, place: Place) -> None:
    """Read the model and its tokenizer, and print how the prompts go on; on every rank of the place."""
    checkpoint = require_checkpoint(
        arguments.checkpoint,
        lambda line: print(line, file=sys.stderr),
        rank=place.rank,
        world_size=place.world_size,
        gather=place.gather,
    )
    run = read_config(checkpoint)
    tokenizer = open_tokenizer(arguments.tokenizer or run.data.tokenizer, checkpoint)
    texts = on_first(place, lambda: read_prompts(arguments.prompt))
    frame = tokenizer.chat_prompt if arguments.chat else str
    prompts = [encode_prompt(frame(text), tokenizer, run.model, arguments.max_new_tokens) for text in texts]
    run.check_tensor_parallel(place.world_size)
    context = decoding_context(run.model, place.device, place.rank, place.world_size)
    plan = LayerPlan(context, dtype=DTYPES[arguments.dtype])
    stage = load_stage(checkpoint, run.model, plan, place.gather)
    continue_prompts(arguments, stage, tokenizer, prompts, Printer(texts, place.is_first))


def open_tokenizer(name: str | None, checkpoint: Path) -> Tokenizer:
    """The tokenizer by its name. TokenizerError when there is none."""
    if name is None:
        raise TokenizerError(f"the run of {checkpoint} names no tokenizer: name it with --tokenizer")
    return load_tokenizer(name)


def on_first(place: Place, action: Callable[[], list[str]]) -> list[str]:
    """What an action gives on the first rank, on every rank."""
    return place.gather(on_all_ranks(place.gather, lambda: action() if place.is_first else []))[0]


def read_prompts(given: Sequence[str]) -> list[str]:
    """The prompts, with the lines of standard input in the place of "-". PromptError when there are none."""
    prompts: list[str] = []
    for text in given:
        prompts += sys.stdin.read().splitlines() if text == STDIN else [text]
    if not prompts:
        raise PromptError("no prompt on standard input: write one a line")
    return prompts


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


def continue_prompts(
    arguments: argparse.Namespace,
    stage: LlamaStage,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    printer: "Printer",
) -> None:
    """Batch by batch, each until all its texts are complete."""
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    generator = torch.Generator(next(stage.parameters()).device).manual_seed(arguments.seed)
    ends = end_tokens(stage.config, tokenizer)
    for first in range(0, len(prompts), arguments.batch_size):
        batch = prompts[first : first + arguments.batch_size]
        texts = [Continuation(tokenizer, ends, arguments.stop) for _ in batch]
        for tokens in decode(stage, batch, arguments.max_new_tokens, sampling, generator):
            for text, token in zip(texts, tokens, strict=True):
                text.add(token)
            printer.show(texts)
            if all(text.is_complete for text in texts):
                break
        printer.finish(texts)


def end_tokens(model: ModelConfig, tokenizer: Tokenizer) -> set[int]:
    """What ends a text: the model's own end of text, else its tokenizer's."""
    if model.eos_token_id is not None:
        return {model.eos_token_id}
    return set() if tokenizer.eos_token is None else {tokenizer.eos_token_id}


class Printer:
    """Prints continuations: that of one prompt as it is made, those of several each below its prompt.

    prompts: all of them, in the order in which they come to be complete.
    speaks: whether this rank is the one that prints.
    """

    def __init__(self, prompts: Sequence[str], speaks: bool) -> None:
        self.speaks, self.is_alone = speaks, len(prompts) == 1
        self._prompts = iter(prompts)

    def show(self, texts: Sequence[Continuation]) -> None:
        """What is new."""
        if self.is_alone:
            self._say(texts[0].news())

    def finish(self, texts: Sequence[Continuation]) -> None:
        """The rest, when a batch has had all its tokens."""
        for text in texts:
            text.end()
            prompt, rest = next(self._prompts), text.news()
            self._say(f"{rest}\n" if self.is_alone else f"==> {prompt} <==\n{rest}\n\n")

    def _say(self, text: str) -> None:
        if self.speaks:
            print(text, end="", flush=True)


if __name__ == "__main__":
    end(main())
