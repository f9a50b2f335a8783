"""Continue prompts or hold a conversation, with a model on one device or cut over several."""

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from megalite.checkpoint.weights import DTYPES
from megalite.error import UserError, run_command
from megalite.generation.chat import NEW, converse
from megalite.generation.conversation import Conversation
from megalite.generation.inbox import Inbox
from megalite.generation.place import Place
from megalite.generation.printer import Printer
from megalite.generation.prompts import check_prompt, read_prompts
from megalite.generation.source import SOURCES, Source, open_source
from megalite.generation.writer import Writer, end_tokens
from megalite.model.sampling import Sampling
from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.load import load_tokenizer
from megalite.tokenizer.template import ChatTemplate, open_template, shipped_templates
from megalite.tokenizer.tokenizer import Tokenizer
from megalite.tokenizer.turn import NO_TURN, TurnEnd, find_turn_end
from megalite.training.command import end
from megalite.training.environment import Environment, choose_cpu_accelerator, is_one_of_many
from megalite.training.processes import run_job
from megalite.training.world import gather

EPILOG = f"""\
The text of one prompt appears as it is made, on standard output; that of several when it is complete, each
below a line with its prompt. An empty prompt begins a new document. Under deepspeed or torchrun every layer
is cut over all processes (tensor parallel), each of which reads and holds its part of the weights alone.

With --chat and no --prompt, each line of standard input is a message, and each reply goes on from all that
was said before; {NEW} as a message begins anew, the end of input (Ctrl-D) ends. A reply ends where the chat
template ends a turn. When the context is full, the oldest messages are left out.

examples:
  python tools/generate.py --checkpoint runs/default --prompt "def main(" --max-new-tokens 100
  python tools/generate.py --checkpoint runs/default --prompt - --stop "\\n\\n" --temperature 0 < prompts.txt
  deepspeed --num_gpus 2 tools/generate.py --checkpoint runs/default --prompt "def main("
  python tools/generate.py --checkpoint runs/preferred --chat --system "Be brief."
"""


# The command line


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    return run_command(partial(start, argv), interrupted="the text is not complete")


def start(argv: list[str] | None) -> None:
    """Generate here, or with the other processes of a launch."""
    if not is_one_of_many():
        arguments = parse(argv)
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
        return parse(argv)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return parse(argv)
    except SystemExit:
        time.sleep(5)  # a launcher ends all ranks when the first one leaves
        raise


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, which go together."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.prompt is None and not arguments.chat:
        parser.error("one of the arguments --prompt --chat is required")
    for option, value in (("--system", arguments.system), ("--chat-template", arguments.chat_template)):
        if value is not None and not arguments.chat:
            parser.error(f"{option} is of a conversation: say --chat as well")
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    where = f"{SOURCES}; of several checkpoints the newest valid one"
    add("--checkpoint", type=Path, required=True, help=where)
    below = "the model below an adapter of PEFT's format (default: the folder that the adapter names)"
    add("--base", type=Path, metavar="FOLDER", help=below)
    text = "text to continue, may be repeated; - reads one a line from standard input"
    add("--prompt", action="append", help=text)
    add_chat(parser)
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


def add_chat(parser: argparse.ArgumentParser) -> None:
    """How a model is talked to."""
    add = parser.add_argument
    add("--chat", action="store_true", help="prompts, or lines of standard input, are messages of a user")
    add("--system", metavar="TEXT", help="message of the system, before the first of the user")
    own = "the run's data.chat_template, else the tokenizer's own"
    template = f"{', '.join(shipped_templates())}, or a Jinja file (default: {own})"
    add("--chat-template", metavar="TEMPLATE", help=template)


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
    """Read the model and its tokenizer, and write; on every rank of the place."""
    source = open_source(arguments.checkpoint, arguments.base, tell, place)
    tokenizer = open_tokenizer(arguments.tokenizer or source.tokenizer, source.path)
    work = chat if arguments.chat else continue_prompts
    work(arguments, place, source, tokenizer)


def continue_prompts(
    arguments: argparse.Namespace, place: Place, source: Source, tokenizer: Tokenizer
) -> None:
    """Print how the prompts go on."""
    texts = place.from_first(lambda: read_prompts(arguments.prompt, sys.stdin))
    prompts = [tokenizer.encode(text) or [tokenizer.eos_token_id] for text in texts]
    for prompt in prompts:
        check_prompt(prompt, tokenizer.name, source.model, arguments.max_new_tokens)
    writer = open_writer(arguments, place, source, tokenizer)
    writer.write_all(prompts, Printer(texts, place.is_first), arguments.batch_size)


def chat(arguments: argparse.Namespace, place: Place, source: Source, tokenizer: Tokenizer) -> None:
    """Answer each prompt by itself, or where there are none, a conversation on standard input."""
    template = open_chat_template(tokenizer, arguments.chat_template or source.chat_template)
    turn_end = find_turn_end(template)
    conversation = Conversation(template, source.model, arguments.max_new_tokens, arguments.system)
    if arguments.prompt is None:
        writer = open_writer(arguments, place, source, tokenizer, turn_end)
        converse(writer, conversation, Inbox(sys.stdin, ask_for_message), tell, place)
        if place.is_first and sys.stdin.isatty():
            tell("")  # the last question has no answer
        return
    texts = place.from_first(lambda: read_prompts(arguments.prompt, sys.stdin))
    # A template may write the date: all ranks go on from what one of them rendered.
    prompts = place.from_first(lambda: [conversation.begin(text) for text in texts])
    writer = open_writer(arguments, place, source, tokenizer, turn_end)
    writer.write_all(prompts, Printer(texts, place.is_first), arguments.batch_size)


def open_writer(
    arguments: argparse.Namespace,
    place: Place,
    source: Source,
    tokenizer: Tokenizer,
    turn_end: TurnEnd = NO_TURN,
) -> Writer:
    """The model in memory, and how it is asked to write."""
    stage = source.load(arguments.dtype, place)
    return Writer(
        stage=stage,
        tokenizer=tokenizer,
        sampling=Sampling(arguments.temperature, arguments.top_k, arguments.top_p),
        generator=torch.Generator(next(stage.parameters()).device).manual_seed(arguments.seed),
        max_new_tokens=arguments.max_new_tokens,
        end_tokens=end_tokens(source.model, tokenizer) | turn_end.token_ids,
        stop_texts=[*arguments.stop, *turn_end.texts],
    )


def open_tokenizer(name: str | None, path: Path) -> Tokenizer:
    """The tokenizer by its name. TokenizerError when there is none."""
    if name is None:
        raise TokenizerError(f"{path} names no tokenizer: name it with --tokenizer")
    return load_tokenizer(name)


def open_chat_template(tokenizer: Tokenizer, name: str | None) -> ChatTemplate:
    """The template by its name, else the tokenizer's own. TokenizerError when there is none."""
    template = open_template(tokenizer, name)
    if template is None:
        known = f"a Jinja file or one of {', '.join(shipped_templates())}"
        raise TokenizerError(f"{tokenizer.name} has no chat template: name {known} with --chat-template")
    return template


def ask_for_message() -> None:
    """Where somebody types messages, say that one is expected."""
    if sys.stdin.isatty():
        print("you> ", end="", file=sys.stderr, flush=True)


def tell(line: str) -> None:
    """A line beside the text."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    end(main())
