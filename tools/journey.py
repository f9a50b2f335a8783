"""A journey through the commands of this repository: each is shown and run, and promises are checked."""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megalite.error import UserError, run_command
from megalite.measure.metrics import METRICS_FILE

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PORT = 29500  # the deepspeed launcher's
LAST_STEPS = 20  # their mean is the loss at the end
TRAIN_TOKENIZER = """python tools/train_tokenizer.py
    --input {run}/corpus/{text}.jsonl --output {run}/tokenizer --vocab-size {vocab_size}"""
PREPROCESS = """python tools/preprocess_data.py
    --input {run}/corpus/{text}.jsonl --output-prefix {run}/corpus/{text} --tokenizer {run}/tokenizer
    --append-eod"""
GENERATE = """python tools/generate.py
    --checkpoint {run}/checkpoints --prompt {prompt} --max-new-tokens 120 --temperature 0.6 --seed {seed}"""
END = """
Done in {clock}{learned}

Everything lies in {run}
{contents}

Go on in {root}
  export PATH=$PWD/.venv/bin:$PATH DS_ACCELERATOR=cpu
{commands}"""


class JourneyError(UserError):
    """A journey cannot begin, or did not do what it promises."""


class Script:
    """Shows commands, numbered by stage, and runs them; {name} in a command stands for that value."""

    def __init__(self, num_stages: int, num_processes: int, **values: object) -> None:
        self.values = {**values, "num_processes": num_processes}
        self.environment = build_environment(num_processes)
        self.num_stages, self.number, self.title = num_stages, 0, ""
        self.started = time.monotonic()

    def clock(self) -> str:
        """Minutes and seconds since the beginning."""
        seconds = int(time.monotonic() - self.started)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def stage(self, title: str) -> None:
        """Begin the next stage."""
        self.number, self.title = self.number + 1, title
        say(f"\n[{self.number}/{self.num_stages}] {title}  ({self.clock()})")

    def run(
        self, command: str, before: str = "", stdin: Path | None = None, shows: bool = True, **more: object
    ) -> str:
        """What a command printed, which is shown too, after `before`. Raises JourneyError when it failed.

        stdin: a file that the command reads. shows: false for an output that only a program wants to read.
        """
        values = {**self.values, **more, "port": port_option()}
        words = list(filter(None, (word.format(**values) for word in shlex.split(command))))
        say(f"$ {shlex.join(words)}" + (f" < {shlex.quote(str(stdin))}" if stdin else ""))
        print(before, end="", flush=True)
        output, status = run_and_show(words, self.environment, stdin, shows)
        if status:
            where = f"stage {self.number} of {self.num_stages} ({self.title})"
            raise JourneyError(f"{where}: {words[0]} ended with status {status} and said why above")
        return output


def tokenize(script: Script) -> None:
    """Two stages: the tokenizer of the corpus {text}.jsonl, with {vocab_size} ids, and its token files."""
    script.stage("Tokenizer: byte-level BPE")
    script.run(TRAIN_TOKENIZER)
    script.stage("Token files, in Megatron's format")
    script.run(PREPROCESS)


def generate(script: Script, prompts: Sequence[str]) -> list[str]:
    """How the run's newest checkpoint continues each prompt."""
    return [
        script.run(GENERATE, before=prompt, prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts)
    ]


def tell_end(script: Script, contents: str, commands: str, learned: Sequence[str] = ()) -> None:
    """Say what was learned, what lies in the folder, and what to do with it; {run} stands for the folder."""
    folder = {"run": script.values["run"]}
    told = {"contents": contents.format(**folder), "commands": commands.format(**folder)}
    lines = "".join(f"\n  {line}" for line in learned)
    say(END.format(clock=script.clock(), learned=lines, root=ROOT, **folder, **told))


def say(text: str) -> None:
    print(text, flush=True)


# What promises are checked with


def read_metric(run_dir: Path, name: str) -> list[float]:
    """A metric of a run, as of each step that measured it; losses are in nats per token."""
    lines = (ROOT / run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    values = [json.loads(line).get(name) for line in lines]
    return [value for value in values if value is not None]


def check_loss_fell(losses: Sequence[float], by_nats: float) -> str:
    """A line on the loss. JourneyError unless it fell by more than `by_nats` from its first value."""
    last = losses[-LAST_STEPS:]
    first, final = losses[0], sum(last) / len(last)
    drop = first - final
    text = f"loss {first:.2f} at step 1, {final:.2f} in the last {len(last)} steps: {drop:.2f} nats less"
    if not drop > by_nats:
        raise JourneyError(f"{text}, and more than {by_nats:g} were promised")
    return text


# Processes


def run_and_show(
    command: list[str], environment: dict[str, str], stdin: Path | None = None, shows: bool = True
) -> tuple[str, int]:
    """(standard output, exit status) of a command, shown as it comes; leaves none of its processes behind."""
    with (ROOT / stdin).open("rb") if stdin else contextlib.nullcontext() as source:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=source, stdout=subprocess.PIPE, start_new_session=True
        )
    assert process.stdout is not None
    output = b""
    try:
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            output += chunk
            if shows:
                print(chunk.decode(errors="replace"), end="", flush=True)
        return output.decode(errors="replace"), process.wait()
    finally:
        process.stdout.close()
        if process.poll() is None:  # interrupted: a launcher alone would leave its ranks running
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def build_environment(num_processes: int) -> dict[str, str]:
    """For the commands: this Python's own programs first, no GPU, and the cores shared among the ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(max(1, cores // num_processes)),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers', for a model that loads in milliseconds
    }


def port_option() -> str:
    """Another port for the ranks to meet at, if something on this machine holds the usual one, else ""."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", DEFAULT_PORT))
            return ""
        except OSError:
            probe.bind(("", 0))
            return f"--master_port={probe.getsockname()[1]}"


# The command


def build_parser(
    name: str,
    description: str | None,
    epilog: str,
    min_loss_drop: float,
    corpus: str = "how much text to read (default: all)",
) -> argparse.ArgumentParser:
    """What every journey is asked: where to write, how long to train, on how much text, what to promise."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=formatter)
    add = parser.add_argument
    where, folder = f"folder to write (default: runs/{name})", ROOT / "runs" / name
    add("--output", type=Path, default=folder, metavar="DIR", help=where)
    add("--steps", type=positive, metavar="N", help="optimizer steps (default: those of the run's YAML)")
    add("--corpus-bytes", type=positive, metavar="N", help=corpus)
    drop = "nats that the loss must fall by, else this fails (default: %(default)s)"
    add("--min-loss-drop", type=float, default=min_loss_drop, metavar="NATS", help=drop)
    return parser


def positive(text: str) -> int:
    """An argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def travel(name: str, arguments: argparse.Namespace, journey: Callable[[argparse.Namespace], None]) -> int:
    """The exit status: 0 when every promise was kept, 2 when one was not, or a command failed."""
    kept = f"what is complete stays in {arguments.output}, and the next {name} there replaces it"
    return run_command(lambda: journey(arguments), interrupted=kept)


def run_folder(output: Path) -> Path:
    """How commands that run in the root name a folder: relative to it where it lies inside."""
    folder = output.resolve()
    return folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder


def make_room(folder: Path, name: str) -> None:
    """Remove what an earlier journey wrote there. JourneyError when the folder holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / "corpus").is_dir():
        raise JourneyError(f"{folder} exists and is not a {name}'s: name another folder with --output")
    say(f"replacing the earlier {name} in {folder}")
    shutil.rmtree(folder)


def exit_with(main: Callable[[], int]) -> None:
    """End this process with main's status; a polite kill, too, leaves no process behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
