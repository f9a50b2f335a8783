"""A Llama of 2 million parameters learns to write English on this machine's CPU, in under five minutes.

Each command is shown before it runs, and can be repeated by itself.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalite.config.load import load_run
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
    tell_end,
    tokenize,
    travel,
)

RUN, DEEPSPEED = "configs/runs/laptop_2m.yaml", "configs/deepspeed/laptop.json"
NUM_PROCESSES = 2
NUM_STAGES = 6
PROMPTS = ("This function returns", "If the file")
MIN_LOSS_DROP = 3.0
MIN_KNOWN = 0.8  # real text has 1, tokens drawn blindly 0.36, drawn by how often they occur 0.47
MIN_DIFFERENT = 0.25  # of the words; real text has about 0.6 in so few
PRETRAIN = f"""deepspeed --quiet --num_gpus {{num_processes}} {{port}} launchers/pretrain.py
    --deepspeed_config {DEEPSPEED} --config {RUN}
    data.train={{run}}/corpus/prose_text_document data.tokenizer={{run}}/tokenizer
    output_dir={{run}} schedule.num_steps={{num_steps}}"""

EPILOG = """\
The text is the English that documents Python and the packages installed with it: nothing is downloaded.
A folder that an earlier laptop run wrote is replaced.

example:
  python tools/laptop.py --output runs/short --steps 300 --min-loss-drop 1.5 --min-known 0.5
"""
CONTENTS = """\
  metrics.png               the picture of the loss, with gradient norm, learning rate and speed
  metrics.jsonl             each step's numbers; tensorboard/ as well
  corpus/                   the text, and its tokens in Megatron's .bin and .idx
  tokenizer/                loads with transformers.AutoTokenizer
  checkpoints/              complete state, for any layout; with config.yaml and deepspeed.json, the run"""
COMMANDS = """\
  python tools/generate.py --checkpoint {run}/checkpoints --prompt "The name of"
  python tools/convert_to_hf.py --checkpoint {run}/checkpoints --output {run}/hf --verify"""


def train_and_speak(arguments: argparse.Namespace) -> None:
    """All of it, from first to last. Raises JourneyError when a command fails or a promise is broken."""
    run, folder = load_run(str(ROOT / RUN), []), run_folder(arguments.output)
    laptop = Script(
        NUM_STAGES,
        NUM_PROCESSES,
        run=folder,
        text="prose",
        limit=f"--max-bytes={arguments.corpus_bytes}" if arguments.corpus_bytes else "",
        vocab_size=run.model.vocab_size,
        num_steps=arguments.steps or run.schedule.num_steps,
    )
    make_room(arguments.output, "laptop run")

    laptop.stage("Text: the English that documents Python and its packages")
    laptop.run("python tools/write_prose.py --output {run}/corpus/prose.jsonl {limit}")

    tokenize(laptop)

    laptop.stage(f"Training: {NUM_PROCESSES} processes, each with half of the batch")
    laptop.run(PRETRAIN)
    losses, validation = read_metric(folder, "loss"), read_metric(folder, "validation_loss")[-1]
    learned = [
        check_loss_fell(losses, arguments.min_loss_drop),
        check_validation(validation, losses[0], arguments.min_loss_drop),
    ]

    laptop.stage("Picture of the loss")
    laptop.run("python tools/plot_run.py {run}")

    laptop.stage("Text that it writes")
    texts, known = generate(laptop, PROMPTS), read_words(ROOT / folder / "corpus/prose.jsonl")
    learned.append(check_words(texts, known, arguments.min_known))
    tell_end(laptop, CONTENTS, COMMANDS, learned)


def check_validation(loss: float, first: float, by_nats: float) -> str:
    """A line on the loss on text not trained on. JourneyError unless it fell like that in training."""
    text = f"loss {loss:.2f} at the end on text that was not trained on"
    if not first - loss > by_nats:
        raise JourneyError(f"{text}: more than {by_nats:g} nats below {first:.2f} were promised")
    return text


def find_words(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return re.findall(r"[^\W\d_]+", text.lower())


def read_words(corpus: Path) -> set[str]:
    """Every word of the corpus."""
    with corpus.open(encoding="utf-8") as lines:
        return {word for line in lines for word in find_words(json.loads(line)["text"])}


def check_words(texts: Iterable[str], known: set[str], min_known: float) -> str:
    """A line on the texts. JourneyError when it is mostly no words, or one again and again."""
    words = find_words(" ".join(texts))
    letters = sum(len(word) for word in words)
    share = sum(len(word) for word in words if word in known) / max(letters, 1)
    different = len(set(words)) / max(len(words), 1)
    line = f"{share:.0%} of the letters lie in words of the corpus, and {different:.0%} of the words differ"
    if share < min_known or different < MIN_DIFFERENT:
        raise JourneyError(f"{line}: at least {min_known:.0%} and {MIN_DIFFERENT:.0%} were promised")
    return line


# The command


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when every promise was kept, 2 when one was not, or a command failed."""
    parser = build_parser("laptop", __doc__, EPILOG, MIN_LOSS_DROP)
    least = "share of the letters written that must lie in words of the corpus (default: %(default)s)"
    parser.add_argument("--min-known", type=float, default=MIN_KNOWN, metavar="SHARE", help=least)
    return travel("laptop run", parser.parse_args(argv), train_and_speak)


if __name__ == "__main__":
    exit_with(main)
