"""Build the shuffled indices of a run ahead of it, on one process and without a GPU, as on a login node.

    python tools/build_index.py --deepspeed_config configs/deepspeed/pretrain_460m.json \\
        --config configs/runs/pretrain_460m.yaml data.train=data/corpus_text_document

Give it what launchers/pretrain.py is given. The run then finds its indices in `data.cache_dir` (default:
`cache` beside the first training file) and begins at once. An index is found as long as the files,
seq_length, split, seed and passes through the data are the same. What is there is checked and left alone.
Of a run that has checkpoints these are the indices with which it goes on.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalite.checkpoint.load import newest_checkpoint, read_state
from megalite.config.deepspeed import load_deepspeed
from megalite.config.load import ConfigError, load_run
from megalite.config.run import RunConfig
from megalite.data.error import DataError
from megalite.data.past import Past
from megalite.error import run_command
from megalite.training.course import Course
from megalite.training.samples import build_samples, open_cache


def build_parser() -> argparse.ArgumentParser:
    """The command line, which is the launcher's."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--deepspeed_config", required=True, metavar="JSON", help="states the batch size of the run")
    add("--config", nargs="?", metavar="YAML", help="the run (default: a small one, built in)")
    ranks = "processes of the run, where the JSON leaves a batch size to be derived from their number"
    add("--num_ranks", type=int, metavar="N", help=ranks)
    add("overrides", nargs="*", metavar="section.key=value", help="changes to the run: data.train=PREFIX")
    return parser


def data_parallel_ranks(run: RunConfig, num_ranks: int | None) -> int | None:
    """Data-parallel ranks among so many processes. ConfigError when the layout does not fit them."""
    if num_ranks is None:
        return None
    if num_ranks < 1:
        raise ConfigError(f"--num_ranks is {num_ranks}: expected a number of at least 1")
    return run.dp_size_of(num_ranks)


def newest_state(run: RunConfig) -> tuple[Mapping[str, Any], str]:
    """That of the checkpoint from which the run would go on, and where it is; empty without one."""
    folder = newest_checkpoint(Path(run.output_dir)) if run.checkpoint.resume else None
    return ({}, "") if folder is None else (read_state(folder), str(folder))


def build(arguments: argparse.Namespace) -> None:
    """Build what is missing, and say what is there; DataError when it cannot be kept."""
    started = time.perf_counter()
    run = load_run(arguments.config, arguments.overrides, arguments.deepspeed_config)
    deepspeed = load_deepspeed(
        arguments.deepspeed_config,
        arguments.config or "the run",
        dp_size=data_parallel_ranks(run, arguments.num_ranks),
        hidden_size=run.model.hidden_size,
    )
    cache = open_cache(run)
    state, where = newest_state(run)
    course = Course.after(state, deepspeed.train_batch_size)
    num_samples = course.end_of(run.schedule.num_steps + run.guard.most_rollbacks)
    past = None if run.data.allow_other_data else Past.of(state, where)
    datasets = build_samples(run, deepspeed.train_batch_size, cache, True, num_samples, past)
    if cache.num_kept < cache.num_built:
        raise DataError(f"{cache.folder}: cannot be written: name another folder as data.cache_dir")
    for part, dataset in datasets._asdict().items():
        if dataset is not None:
            print(f"{part}: {len(dataset):,} samples, {len(dataset.indexed_datasets):,} files")
    seconds = time.perf_counter() - started
    print(f"{cache.folder}: {cache.num_built} indices built, {cache.num_found} found, {seconds:.1f} s")


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when all indices are kept, 2 when the user can put it right."""
    arguments = build_parser().parse_intermixed_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        return run_command(lambda: build(arguments), interrupted="indices that were complete are kept")


if __name__ == "__main__":
    sys.exit(main())
