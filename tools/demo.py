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
from megalite.error import UserError, run_command
from megalite.measure.metrics import METRICS_FILE

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
PRETRAIN = f"""deepspeed --quiet --num_gpus {{num_processes}} {{port}} launchers/pretrain.py
    --deepspeed_config {DEEPSPEED} --config {RUN}
    data.train={{run}}/corpus/python_text_document data.tokenizer={{run}}/tokenizer
    output_dir={{output}} parallel.tp_size=2"""
PRETRAIN_IN_STAGES = f"""{PRETRAIN} parallel.pp_size=2 schedule.num_steps={{few_steps}}
    checkpoint.save_at_end=false logging.validate_every_steps=0"""
GENERATE = """python tools/generate.py
    --checkpoint {run}/checkpoints --prompt {prompt} --max-new-tokens 120 --temperature 0.6 --seed {seed}"""

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


def demonstrate(arguments: argparse.Namespace) -> None:
    """The demo, from first to last. Raises DemoError when a command fails or a promise is broken."""
    run, folder = load_run(str(ROOT / RUN), []), arguments.output.resolve()
    folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    num_steps = arguments.steps or run.schedule.num_steps
    demo = Script(
        run=folder,
        corpus=json.dumps(f"{folder}/corpus/python.jsonl"),
        limit=f", max_bytes={arguments.corpus_bytes}" if arguments.corpus_bytes else "",
        vocab_size=run.model.vocab_size,
        num_steps=num_steps,
        few_steps=min(PIPELINE_STEPS, num_steps),
        num_processes=NUM_PROCESSES,
    )
    make_room(arguments.output)

    demo.stage("Corpus: the source of Python's standard library, one document per file")
    demo.run("""python -c
        'from megalite.data.corpus import write_jsonl; print(write_jsonl({corpus}{limit}), "documents")'""")

    demo.stage("Tokenizer: byte-level BPE")
    demo.run("""python tools/train_tokenizer.py
        --input {run}/corpus/python.jsonl --output {run}/tokenizer --vocab-size {vocab_size}""")

    demo.stage("Token files, in Megatron's format")
    demo.run("""python tools/preprocess_data.py
        --input {run}/corpus/python.jsonl --output-prefix {run}/corpus/python --tokenizer {run}/tokenizer
        --append-eod""")
    check_corpus_suffices(ROOT / folder / "corpus/python_text_document", num_steps)

    demo.stage("Training: tensor parallel 2 x data parallel 2, sequence parallel, ZeRO-3")
    demo.run(PRETRAIN + " schedule.num_steps={num_steps}", output=folder)
    losses = read_losses(folder)
    say(check_loss_fell(losses, arguments.min_loss_drop))

    demo.stage("The same run's first steps in a pipeline: tensor parallel 2 x 2 stages")
    demo.run(PRETRAIN_IN_STAGES, output=folder / "pipeline")
    say(check_same_curve(losses, read_losses(folder / "pipeline")))

    demo.stage("Hugging Face: export, load with transformers, compare")
    report = demo.run("""python tools/convert_to_hf.py
        --checkpoint {run}/checkpoints --output {run}/hf --dtype float32 --verify""")
    say(check_logits(report))

    demo.stage("Generated code")
    for seed, prompt in enumerate(PROMPTS):
        demo.run(GENERATE, before=prompt, prompt=prompt, seed=seed)

    demo.stage("Curves")
    demo.run("python tools/plot_run.py {run}")
    say(f"\nDone in {demo.clock()}")
    say(NEXT.format(run=folder, root=ROOT, environment=ENVIRONMENT))


class Script:
    """Shows commands, numbered by stage, and runs them; {name} in a command stands for that value."""

    def __init__(self, **values: object) -> None:
        self.values, self.environment = values, build_environment()
        self.title, self.number, self.started = "", 0, time.monotonic()

    def clock(self) -> str:
        """Minutes and seconds since the beginning."""
        seconds = int(time.monotonic() - self.started)
        return f"{seconds // 60}:{seconds % 60:02d}"

    def stage(self, title: str) -> None:
        """Begin the next stage."""
        self.number, self.title = self.number + 1, title
        say(f"\n[{self.number}/{NUM_STAGES}] {title}  ({self.clock()})")

    def run(self, command: str, before: str = "", **more: object) -> str:
        """What a command printed, which is shown too, after `before`. Raises DemoError when it failed."""
        values = {**self.values, **more, "port": port_option()}
        words = list(filter(None, (word.format(**values) for word in shlex.split(command))))
        say(f"$ {shlex.join(words)}")
        print(before, end="", flush=True)
        output, status = run_and_show(words, self.environment)
        if status:
            where = f"stage {self.number} of {NUM_STAGES} ({self.title})"
            raise DemoError(f"{where}: {words[0]} ended with status {status} and said why above")
        return output


def say(text: str) -> None:
    print(text, flush=True)


# What the promises are checked with


def read_losses(run_dir: Path) -> list[float]:
    """The training loss of each step of a run, in nats per token."""
    lines = (ROOT / run_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


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
    """Run the command; 0 when every promise was kept, 2 when one was not, or a command failed."""
    arguments = build_parser().parse_args(argv)
    kept = f"what is complete stays in {arguments.output}, and the next demo there replaces it"
    return run_command(lambda: demonstrate(arguments), interrupted=kept)


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
