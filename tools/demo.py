"""The whole journey on this machine's CPU, in minutes: text, tokens, training, Hugging Face, generated code.

Each command is shown before it runs, and can be repeated by itself.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalite.config.deepspeed import load_deepspeed
from megalite.config.load import load_run
from megalite.data.datasets import build_datasets
from megalite.error import UserError

ROOT = Path(__file__).resolve().parent.parent
RUN, DEEPSPEED = "configs/runs/demo.yaml", "configs/deepspeed/demo.json"
NUM_PROCESSES = 4
DEFAULT_PORT = 29500  # the deepspeed launcher's
NUM_STAGES = 8
PIPELINE_STEPS = 10
LAST_STEPS = 20  # their mean is the loss at the end
SAME_LOSS_NATS = 1e-3  # float32 sums in another order, over PIPELINE_STEPS steps
SAME_LOGITS = 1e-4
PROMPTS = ("def read(self", "if __name__ ==")
ENVIRONMENT = "export PATH=$PWD/.venv/bin:$PATH DS_ACCELERATOR=cpu"

EPILOG = """\
The text is the source of Python's own standard library, as found on this machine: nothing is downloaded.
A folder that an earlier demo wrote is replaced.

example:
  python tools/demo.py --output runs/short --steps 300 --min-loss-drop 1.5
"""
NEXT = """\
Everything lies in {run}
  corpus/                   the text, and its tokens in Megatron's .bin and .idx
  tokenizer/                loads with transformers.AutoTokenizer
  metrics.jsonl, .png       each step's loss, gradient norm, learning rate and speed; tensorboard/ as well
  checkpoints/              complete state, for any layout; with config.yaml and deepspeed.json, the run
  pipeline/                 the run in two stages
  hf/                       loads with transformers.AutoModelForCausalLM

Go on in {root}
  {environment}
  python tools/generate.py --checkpoint {run}/checkpoints --prompt "def __init__(self"
  tensorboard --logdir {run}
  deepspeed --num_gpus 4 launchers/pretrain.py --deepspeed_config configs/deepspeed/zero3.json \\
            parallel.tp_size=2 parallel.pp_size=2 output_dir=runs/first"""


class DemoError(UserError):
    """The demo cannot begin, or did not do what it promises."""


class Demo:
    """The stages, in order; each shows its command and runs it."""

    def __init__(self, folder: Path, num_steps: int) -> None:
        self.folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
        self.num_steps = num_steps
        self.environment = build_environment()
        self.corpus, self.prefix = self.folder / "corpus/python.jsonl", self.folder / "corpus/python"
        self.tokens = self.folder / "corpus/python_text_document"
        self.tokenizer = self.folder / "tokenizer"
        self.checkpoints = self.folder / "checkpoints"
        self.title, self.stage, self.started = "", 0, time.monotonic()

    def make_data(self, vocab_size: int, max_bytes: int | None) -> None:
        self._begin("Corpus: the source of Python's standard library, one document per file")
        limit = f", max_bytes={max_bytes}" if max_bytes else ""
        path = json.dumps(str(self.corpus))
        code = f'from megalite.data.corpus import write_jsonl; print(write_jsonl({path}{limit}), "documents")'
        self._run("python", "-c", code)
        self._begin("Tokenizer: byte-level BPE")
        where = ("--input", self.corpus, "--output", self.tokenizer)
        self._run("python", "tools/train_tokenizer.py", *where, "--vocab-size", vocab_size)
        self._begin("Token files, in Megatron's format")
        where = ("--input", self.corpus, "--output-prefix", self.prefix)
        self._run("python", "tools/preprocess_data.py", *where, "--tokenizer", self.tokenizer, "--append-eod")
        check_corpus_suffices(ROOT / self.tokens, self.num_steps)

    def train(self, min_loss_drop_nats: float) -> None:
        self._begin("Training: tensor parallel 2 x data parallel 2, sequence parallel, ZeRO-3")
        self._pretrain(self.folder, f"schedule.num_steps={self.num_steps}")
        say(check_loss_fell(self._losses(self.folder), min_loss_drop_nats))

    def train_in_stages(self) -> None:
        self._begin("The same run's first steps in a pipeline: tensor parallel 2 x 2 stages")
        num_steps = min(PIPELINE_STEPS, self.num_steps)
        options = ("parallel.pp_size=2", f"schedule.num_steps={num_steps}", "checkpoint.save_at_end=false")
        self._pretrain(self.folder / "pipeline", *options, "logging.validate_every_steps=0")
        say(check_same_curve(self._losses(self.folder), self._losses(self.folder / "pipeline")))

    def export(self) -> None:
        self._begin("Hugging Face: export, load with transformers, compare")
        where = ("--checkpoint", self.checkpoints, "--output", self.folder / "hf")
        report = self._run("python", "tools/convert_to_hf.py", *where, "--dtype", "float32", "--verify")
        say(check_logits(report))

    def speak(self) -> None:
        self._begin("Generated code")
        for seed, prompt in enumerate(PROMPTS):
            draw = ("--prompt", prompt, "--max-new-tokens", 120, "--temperature", 0.6, "--seed", seed)
            command = ("python", "tools/generate.py", "--checkpoint", self.checkpoints, *draw)
            self._run(*command, before=prompt)

    def plot(self) -> None:
        self._begin("Curves")
        self._run("python", "tools/plot_run.py", self.folder)

    def _pretrain(self, output_dir: Path, *overrides: str) -> None:
        launch = ("deepspeed", "--quiet", "--num_gpus", NUM_PROCESSES, *port_option())
        config = ("launchers/pretrain.py", "--deepspeed_config", DEEPSPEED, "--config", RUN)
        data = (f"data.train={self.tokens}", f"data.tokenizer={self.tokenizer}")
        self._run(*launch, *config, *data, f"output_dir={output_dir}", "parallel.tp_size=2", *overrides)

    def _losses(self, run_dir: Path) -> list[float]:
        lines = (ROOT / run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def _begin(self, title: str) -> None:
        self.stage, self.title = self.stage + 1, title
        say(f"\n[{self.stage}/{NUM_STAGES}] {title}  ({clock(time.monotonic() - self.started)})")

    def _run(self, *words: object, before: str = "") -> str:
        """What a command printed, which is shown too, after `before`. DemoError when it failed."""
        command = [str(word) for word in words]
        say(f"$ {shlex.join(command)}")
        print(before, end="", flush=True)
        output, status = run_and_show(command, self.environment)
        if status:
            raise DemoError(
                f"stage {self.stage} of {NUM_STAGES} ({self.title}): {command[0]} ended with status {status} "
                "and said why above"
            )
        return output


def say(text: str) -> None:
    print(text, flush=True)


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# What the promises are checked with


def check_corpus_suffices(tokens: Path, num_steps: int) -> None:
    """Within one epoch the samples' order is that of any shorter run, so that the two can be compared."""
    run, deepspeed = load_run(str(ROOT / RUN), []), load_deepspeed(str(ROOT / DEEPSPEED))
    data, seq_length = run.data, run.data.seq_length
    sizes: dict[str, Any] = {"split": data.split, "seq_length": seq_length, "seed": run.seed}
    samples = build_datasets([str(tokens)], **sizes, train_samples=None, validation_samples=0)[0]
    assert samples is not None  # every run trains
    most = len(samples) // deepspeed.train_batch_size
    if num_steps > most:
        raise DemoError(f"--steps {num_steps}: the corpus has text for {most} steps: take at most so many")


def check_loss_fell(losses: Sequence[float], by_nats: float) -> str:
    """A line on the loss. DemoError unless it fell by more than `by_nats` from its first value."""
    last = losses[-LAST_STEPS:]
    first, final = losses[0], sum(last) / len(last)
    drop = first - final
    text = f"loss {first:.2f} at step 1, {final:.2f} in the last {len(last)} steps: {drop:.2f} nats less"
    if not drop > by_nats:
        raise DemoError(f"{text}, and more than {by_nats:g} were promised")
    return text


def check_same_curve(losses: Sequence[float], others: Sequence[float]) -> str:
    """A table of two runs' first losses. DemoError where they differ by more than rounding."""
    lines = ["step    tensor 2 x data 2    tensor 2 x pipeline 2    difference"]
    for step, (loss, other) in enumerate(zip(losses[: len(others)], others, strict=True), start=1):
        difference = abs(loss - other)
        lines.append(f"{step:4d} {loss:20.6f} {other:24.6f} {difference:13.1e}")
        if not difference <= SAME_LOSS_NATS:
            raise DemoError(
                f"step {step}: losses {loss:.6f} and, in a pipeline, {other:.6f} are not the same"
            )
    return "\n".join([*lines, "the same curve"])


def check_logits(report: str) -> str:
    """A line on the converter's report. DemoError unless the logits of both implementations are the same."""
    found = re.search(r"difference of a logit.*?: (\S+)", report)
    difference = float(found[1]) if found else float("nan")
    if not difference <= SAME_LOGITS:
        raise DemoError(f"logits of transformers differ by {difference:g}, above {SAME_LOGITS:g}")
    return f"transformers gives the same logits, to {SAME_LOGITS:g}"


# Processes


def run_and_show(command: list[str], environment: dict[str, str]) -> tuple[str, int]:
    """(standard output, exit status) of a command, shown as it comes; leaves none of its processes behind."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    output = b""
    try:
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            output += chunk
            print(chunk.decode(errors="replace"), end="", flush=True)
        return output.decode(errors="replace"), process.wait()
    finally:
        process.stdout.close()
        if process.poll() is None:  # interrupted: a launcher alone would leave its ranks running
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def build_environment() -> dict[str, str]:
    """For the commands: this Python's own programs first, no GPU, and the cores shared among the ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(max(1, cores // NUM_PROCESSES)),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers', for a model that loads in milliseconds
    }


def port_option() -> list[str]:
    """Another port for the ranks to meet at, if something on this machine holds the usual one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", DEFAULT_PORT))
            return []
        except OSError:
            probe.bind(("", 0))
            return ["--master_port", str(probe.getsockname()[1])]


def make_room(folder: Path) -> None:
    """Remove what an earlier demo wrote there. DemoError when the folder holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / "corpus").is_dir():
        raise DemoError(f"{folder} exists and is not a demo's: name another folder with --output")
    say(f"replacing the earlier demo in {folder}")
    shutil.rmtree(folder)


# The command


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        demonstrate(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


def demonstrate(arguments: argparse.Namespace) -> None:
    run = load_run(str(ROOT / RUN), [])
    demo = Demo(arguments.output.resolve(), arguments.steps or run.schedule.num_steps)
    make_room(arguments.output)
    demo.make_data(run.model.vocab_size, arguments.corpus_bytes)
    demo.train(arguments.min_loss_drop)
    demo.train_in_stages()
    demo.export()
    demo.speak()
    demo.plot()
    say(f"\nDone in {clock(time.monotonic() - demo.started)}")
    say(NEXT.format(run=demo.folder, root=ROOT, environment=ENVIRONMENT))


def build_parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    folder = ROOT / "runs/demo"
    add("--output", type=Path, default=folder, metavar="DIR", help="folder to write (default: runs/demo)")
    add("--steps", type=positive, metavar="N", help="optimizer steps (default: those of the run's YAML)")
    add("--corpus-bytes", type=positive, metavar="N", help="how much text to read (default: all)")
    drop = "nats that the loss must fall by, else the demo has failed (default: %(default)s)"
    add("--min-loss-drop", type=float, default=2.0, metavar="NATS", help=drop)
    return parser


def positive(text: str) -> int:
    """An argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    sys.exit(main())
