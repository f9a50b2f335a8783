"""The whole journey on this machine's CPU, in minutes: text, tokens, training, Hugging Face, generated code.

Each command is shown before it runs, and can be repeated by itself.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.config.deepspeed import load_deepspeed
from megalite.config.load import load_run
from megalite.data.datasets import build_datasets
from tools.journey import (
    ROOT,
    JourneyError,
    Script,
    build_parser,
    check_loss_fell,
    exit_with,
    generate,
    make_room,
    read_metric,
    run_folder,
    say,
    tell_end,
    tokenize,
    travel,
)

RUN, DEEPSPEED = "configs/runs/demo.yaml", "configs/deepspeed/demo.json"
NUM_PROCESSES = 4
NUM_STAGES = 8
PIPELINE_STEPS = 10
SAME_LOSS_NATS = 1e-3  # float32 sums in another order, over PIPELINE_STEPS steps
SAME_LOGITS = 1e-4
PROMPTS = ("def read(self", "if __name__ ==")
PRETRAIN = f"""deepspeed --quiet --num_gpus {{num_processes}} {{port}} launchers/pretrain.py
    --deepspeed_config {DEEPSPEED} --config {RUN}
    data.train={{run}}/corpus/python_text_document data.tokenizer={{run}}/tokenizer
    output_dir={{output}} parallel.tp_size=2"""
PRETRAIN_IN_STAGES = f"""{PRETRAIN} parallel.pp_size=2 schedule.num_steps={{few_steps}}
    checkpoint.save_at_end=false logging.validate_every_steps=0"""

EPILOG = """\
The text is the source of Python's own standard library, as found on this machine: nothing is downloaded.
A folder that an earlier demo wrote is replaced.

example:
  python tools/demo.py --output runs/short --steps 300 --min-loss-drop 1.5
"""
CONTENTS = """\
  corpus/                   the text, and its tokens in Megatron's .bin and .idx
  tokenizer/                loads with transformers.AutoTokenizer
  metrics.jsonl, .png       each step's loss, gradient norm, learning rate and speed; tensorboard/ as well
  checkpoints/              complete state, for any layout; with config.yaml and deepspeed.json, the run
  pipeline/                 the run in two stages
  hf/                       loads with transformers.AutoModelForCausalLM"""
COMMANDS = """\
  python tools/generate.py --checkpoint {run}/checkpoints --prompt "def __init__(self"
  tensorboard --logdir {run}
  deepspeed --num_gpus 4 launchers/pretrain.py --deepspeed_config configs/deepspeed/zero3.json \\
            parallel.tp_size=2 parallel.pp_size=2 output_dir=runs/first"""


def demonstrate(arguments: argparse.Namespace) -> None:
    """The demo, from first to last. Raises JourneyError when a command fails or a promise is broken."""
    run, folder = load_run(str(ROOT / RUN), []), run_folder(arguments.output)
    num_steps = arguments.steps or run.schedule.num_steps
    demo = Script(
        NUM_STAGES,
        NUM_PROCESSES,
        run=folder,
        text="python",
        corpus=json.dumps(f"{folder}/corpus/python.jsonl"),
        limit=f", max_bytes={arguments.corpus_bytes}" if arguments.corpus_bytes else "",
        vocab_size=run.model.vocab_size,
        num_steps=num_steps,
        few_steps=min(PIPELINE_STEPS, num_steps),
    )
    make_room(arguments.output, "demo")

    demo.stage("Corpus: the source of Python's standard library, one document per file")
    demo.run("""python -c
        'from megalite.data.corpus import write_jsonl; print(write_jsonl({corpus}{limit}), "documents")'""")

    tokenize(demo)
    check_corpus_suffices(ROOT / folder / "corpus/python_text_document", num_steps)

    demo.stage("Training: tensor parallel 2 x data parallel 2, sequence parallel, ZeRO-3")
    demo.run(PRETRAIN + " schedule.num_steps={num_steps}", output=folder)
    losses = read_metric(folder, "loss")
    say(check_loss_fell(losses, arguments.min_loss_drop))

    demo.stage("The same run's first steps in a pipeline: tensor parallel 2 x 2 stages")
    demo.run(PRETRAIN_IN_STAGES, output=folder / "pipeline")
    say(check_same_curve(losses, read_metric(folder / "pipeline", "loss")))

    demo.stage("Hugging Face: export, load with transformers, compare")
    report = demo.run("""python tools/convert_to_hf.py
        --checkpoint {run}/checkpoints --output {run}/hf --dtype float32 --verify""")
    say(check_logits(report))

    demo.stage("Generated code")
    generate(demo, PROMPTS)

    demo.stage("Curves")
    demo.run("python tools/plot_run.py {run}")
    tell_end(demo, CONTENTS, COMMANDS)


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
        raise JourneyError(f"--steps {num_steps}: the corpus has text for {most} steps: take at most so many")


def check_same_curve(losses: Sequence[float], others: Sequence[float]) -> str:
    """A table of two runs' first losses. JourneyError where they differ by more than rounding."""
    lines = ["step    tensor 2 x data 2    tensor 2 x pipeline 2    difference"]
    for step, (loss, other) in enumerate(zip(losses[: len(others)], others, strict=True), start=1):
        difference = abs(loss - other)
        lines.append(f"{step:4d} {loss:20.6f} {other:24.6f} {difference:13.1e}")
        if not difference <= SAME_LOSS_NATS:
            raise JourneyError(
                f"step {step}: losses {loss:.6f} and, in a pipeline, {other:.6f} are not the same"
            )
    return "\n".join([*lines, "the same curve"])


def check_logits(report: str) -> str:
    """A line on the converter's report. JourneyError unless both implementations give the same logits."""
    found = re.search(r"difference of a logit.*?: (\S+)", report)
    difference = float(found[1]) if found else float("nan")
    if not difference <= SAME_LOGITS:
        raise JourneyError(f"logits of transformers differ by {difference:g}, above {SAME_LOGITS:g}")
    return f"transformers gives the same logits, to {SAME_LOGITS:g}"


# The command


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when every promise was kept, 2 when one was not, or a command failed."""
    arguments = build_parser("demo", __doc__, EPILOG, min_loss_drop=2.0).parse_args(argv)
    return travel("demo", arguments, demonstrate)


if __name__ == "__main__":
    exit_with(main)
