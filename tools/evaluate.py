"""Measure a model: perplexity on token files, and tasks of EleutherAI's lm-evaluation-harness."""

import argparse
import importlib.metadata
import sys
from pathlib import Path

import torch

from megalite.checkpoint.weights import DTYPES
from megalite.data.indexed_dataset import IndexedDataset
from megalite.error import run_command
from megalite.evaluation.harness import Harness
from megalite.evaluation.perplexity import measure_perplexity
from megalite.evaluation.record import Evaluation, EvaluationError, Measurement, format_table
from megalite.evaluation.subject import Subject, open_subject
from megalite.tokenizer.text_bytes import count_text_bytes

EPILOG = """\
--perplexity cuts each document into windows of --context tokens that do not overlap (the stride is the
context), and each window predicts all its tokens but the first. The loss is in nats per token; perplexity is
per token, and per byte of text where the tokenizer is byte-level.

--tasks needs pip install 'megalite[eval]', and a network for the data of tasks that are not local.
megalite_reference is a group of ours, in configs/evaluation/.

examples:
  python tools/evaluate.py --checkpoint runs/default --perplexity data/corpus_text_document
  python tools/evaluate.py --checkpoint runs/default --tasks megalite_reference --dtype bfloat16
  python tools/evaluate.py --checkpoint exported --tasks mine --include-path my/tasks --output mine.json
"""
TASK_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "evaluation"
RECORD = "evaluation.json"  # in the run's folder
PACKAGES = ("megalite", "torch", "transformers", "lm_eval")


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if not arguments.tasks and not arguments.perplexity:
        parser.error("nothing to measure: name --tasks or --perplexity")
    return run_command(lambda: evaluate(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    where = "run's folder, its checkpoints/ (the newest valid one), a step-N in it, or a Hugging Face folder"
    add("--checkpoint", type=Path, required=True, help=where)
    add("--perplexity", nargs="+", default=[], metavar="PREFIX", help="token files PREFIX.bin and PREFIX.idx")
    context = "tokens of a window of --perplexity (default: the model's max_position_embeddings)"
    add("--context", type=positive, metavar="N", help=context)
    names = "tasks, groups or tags of the harness, such as megalite_reference or arc_easy,wikitext"
    add("--tasks", type=lambda text: text.split(","), default=[], metavar="NAME,...", help=names)
    add("--include-path", type=Path, metavar="FOLDER", help="folder with task files of your own")
    shots = "solved examples in each prompt (default: each task's own number)"
    add("--num-fewshot", type=int, choices=range(101), metavar="N", help=shots)
    limit = "only the first N examples of each task, and documents of each PREFIX"
    add("--limit", type=positive, metavar="N", help=limit)
    add("--batch-size", type=positive, default=8, metavar="N", help="default: %(default)s")
    add("--tokenizer", help="folder, file or 'bytes' (default: the run's data.tokenizer, or the folder's)")
    add("--dtype", choices=DTYPES, default="float32", help="to compute in (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="default here: %(default)s")
    output = f"JSON to write (default: RUN_DIR/{RECORD} for a checkpoint in a run's folder)"
    add("--output", type=Path, metavar="FILE.json", help=output)
    return parser


def positive(text: str) -> int:
    """An argparse type."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure what was asked for, print it, and write it down."""
    folders = [TASK_FOLDER, *([arguments.include_path] if arguments.include_path else [])]
    harness = Harness(arguments.tasks, folders) if arguments.tasks else None
    datasets = [IndexedDataset(prefix) for prefix in arguments.perplexity]
    subject = open_subject(arguments.checkpoint, arguments.tokenizer, arguments.dtype, say)
    subject.model.to(arguments.device)
    arguments.context = arguments.context or subject.model.config.max_position_embeddings
    measurements = [row for dataset in datasets for row in on_tokens(dataset, subject, arguments)]
    if harness:
        measurements += on_tasks(harness, subject, arguments)
    print(format_table(measurements))
    output = arguments.output or (subject.run_folder and subject.run_folder / RECORD)
    if output:
        Evaluation(subject.origin, settings(arguments), versions(), measurements).save(output)
        say(f"wrote {output}")


def say(line: str) -> None:
    """Tell a person; standard output is the table's."""
    print(line, file=sys.stderr)


def on_tokens(dataset: IndexedDataset, subject: Subject, arguments: argparse.Namespace) -> list[Measurement]:
    """Loss and perplexity on one token file."""
    vocab_size, tokenizer = subject.model.config.vocab_size, subject.tokenizer
    found = measure_perplexity(
        subject.model,
        dataset,
        context=arguments.context,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        bytes_of_ids=None if tokenizer is None else count_text_bytes(tokenizer, vocab_size),
        progress=True,
    )
    counts = f"{found.num_predicted:,} of {found.num_tokens:,} tokens in {found.num_documents:,} documents"
    say(f"{dataset.prefix}: predicted {counts}")
    return found.measurements(Path(dataset.prefix).name)


def on_tasks(harness: Harness, subject: Subject, arguments: argparse.Namespace) -> list[Measurement]:
    """What the harness measures. Raises EvaluationError without a tokenizer that ends a text."""
    tokenizer = subject.tokenizer
    if tokenizer is None or tokenizer.eos_token is None:
        found = "none" if tokenizer is None else f"{tokenizer.name} without one"
        raise EvaluationError(
            f"--tasks: expected a tokenizer with an end of text, found {found}: name one with --tokenizer"
        )
    return harness.run(
        subject.model,
        tokenizer,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
    )


def settings(arguments: argparse.Namespace) -> dict[str, object]:
    """What decides the numbers besides the model: the options that had a part in them."""
    names = ["limit", "dtype", "device", "batch_size"]
    names += ["tasks", "num_fewshot"] if arguments.tasks else []
    names += ["perplexity", "context"] if arguments.perplexity else []
    return {name: getattr(arguments, name) for name in names}


def versions() -> dict[str, str]:
    """Of the packages that took part, where they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
