"""tools/preprocess_data.py from JSON lines on disk to a synced dataset, start of the workers and all, against
`tokenizers` alone: `encode_batch_fast` on the same documents, in memory already, by as many threads, in
batches of the size that suits it best, its ids never read. Documents are 3,000 characters of Python source,
the tokenizer is byte-level BPE with 8,192 ids. MB are of text; of three rounds the best counts. The rows "per
CPU second" count the time of all cores in use, which is steadier where others use the machine too. Memory is
that of the command and its two workers together, at the peak of each.
"""

import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.measurement import Measurement, in_fresh_process
from benchmarks.process_memory import peak_bytes

TITLE = "Preprocessing"
PEER = "tokenizers alone"
ROOT = Path(__file__).resolve().parents[1]
INPUT_BYTES = 50_000_000
TRAINING_BYTES = 4_000_000
MEMORY_BYTES = (50_000_000, 500_000_000)
DOCUMENT_CHARACTERS = 3000
BATCH_BYTES = 1 << 18
ROUNDS = 3


class Cost(NamedTuple):
    """What a run took."""

    seconds: float
    cpu_seconds: float


class Stopwatch:
    """Time of the block, and CPU time of this process and of the children that ended in it."""

    def __enter__(self) -> "Stopwatch":
        self._began, self._cpu = time.perf_counter(), sum(os.times()[:4])
        return self

    def __exit__(self, *error: object) -> None:
        self.cost = Cost(time.perf_counter() - self._began, sum(os.times()[:4]) - self._cpu)


def documents(num_bytes: int) -> Iterator[str]:
    """Pieces of Python's standard library in another order each time round, about `num_bytes` of them."""
    from megalite.data.corpus import read_corpus

    texts = [text for _, text in read_corpus()]
    starts = ((text, start) for text in texts for start in range(0, len(text), DOCUMENT_CHARACTERS))
    pieces = [text[start : start + DOCUMENT_CHARACTERS] for text, start in starts]
    draw, size = random.Random(0), 0
    while True:
        draw.shuffle(pieces)
        for piece in pieces:
            yield piece
            size += len(piece.encode())
            if size >= num_bytes:
                return


def write_input(path: Path, num_bytes: int) -> int:
    """JSON lines; returns the bytes of text in them."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for text in documents(num_bytes):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
    return size


def encode_alone(source: Path, tokenizer: Path, threads: int) -> Cost:
    """`tokenizers` on all documents."""
    os.environ.update(RAYON_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM=str(threads > 1).lower())
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    batches: list[list[str]] = [[]]
    size = 0
    with source.open(encoding="utf-8") as file:
        for text in (json.loads(line)["text"] for line in file):
            batches[-1].append(text)
            size += len(text)
            if size >= BATCH_BYTES * threads:
                batches.append([])
                size = 0
    with Stopwatch() as watch:
        for batch in batches:
            backend.encode_batch_fast(batch, add_special_tokens=False)
    return watch.cost


def preprocess(source: Path, tokenizer: Path, workers: int) -> Cost:
    """The whole command but its imports."""
    from tools import preprocess_data

    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        arguments = ["--input", str(source), "--output-prefix", f"{folder}/p", "--tokenizer", str(tokenizer)]
        arguments += ["--append-eod", "--workers", str(workers)]
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet), Stopwatch() as watch:
            status = preprocess_data.main(arguments)
    if status:
        raise RuntimeError(quiet.getvalue()[-500:])
    return watch.cost


def measure_speed(source: Path, tokenizer: Path, megabytes: float, workers: int) -> list[Measurement]:
    """Both, in turns; the best round of each, as other users of the machine only ever slow it down."""
    ours, theirs = [], []
    for _ in range(ROUNDS):
        theirs.append(in_fresh_process(encode_alone, source, tokenizer, workers))
        ours.append(in_fresh_process(preprocess, source, tokenizer, workers))
    name = f"{workers} worker" + "s" * (workers > 1)
    wall = [megabytes / min(cost.seconds for cost in costs) for costs in (ours, theirs)]
    work = [megabytes / min(cost.cpu_seconds for cost in costs) for costs in (ours, theirs)]
    return [Measurement(name, "MB/s", *wall), Measurement(f"{name}, per CPU second", "MB", *work)]


def measure_memory(folder: Path, tokenizer: Path, num_bytes: int) -> Measurement:
    """Of two workers, for an input of that size."""
    source = folder / "memory.jsonl"
    write_input(source, num_bytes)
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(source), "--workers", "2"]
    command += ["--output-prefix", str(folder / "memory"), "--tokenizer", str(tokenizer), "--append-eod"]
    name = f"peak memory for {num_bytes // 1_000_000} MB, 2 workers"
    return Measurement(name, "MB", peak_bytes(command, cwd=ROOT) / 1e6, higher_is_better=False)


def train_tokenizer(folder: Path) -> Path:
    """Byte-level BPE with 8,192 ids."""
    from tools import train_tokenizer

    write_input(folder / "train.jsonl", TRAINING_BYTES)
    arguments = ["--input", str(folder / "train.jsonl"), "--output", str(folder / "tokenizer")]
    if train_tokenizer.main(arguments):
        raise RuntimeError("no tokenizer")
    return folder / "tokenizer"


def measure() -> list[Measurement]:
    """All rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = train_tokenizer(folder)
        megabytes = write_input(folder / "speed.jsonl", INPUT_BYTES) / 1e6
        rows = []
        for workers in (1, 2):
            rows += measure_speed(folder / "speed.jsonl", tokenizer, megabytes, workers)
        return rows + [measure_memory(folder, tokenizer, num_bytes) for num_bytes in MEMORY_BYTES]
