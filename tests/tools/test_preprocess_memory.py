import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from benchmarks.process_memory import peak_bytes

ROOT = Path(__file__).resolve().parents[2]
MB = 1_000_000
TEXT = "memory stays flat, whatever the size of the input is. " * 40


def write_lines(path, texts):
    with gzip.open(path, "wt", 1) if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def write_parquet(path, texts):
    parquet.write_table(pyarrow.table({"text": texts}), path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("ending", "write"), [("jsonl", write_lines), ("jsonl.gz", write_lines), ("parquet", write_parquet)]
)
def test_peak_memory_does_not_grow_with_the_input(tmp_path, ending, write):
    peaks = []
    for megabytes in (5, 20):
        source = tmp_path / f"{megabytes}.{ending}"
        write(source, [f"{number} {TEXT}" for number in range(megabytes * MB // len(TEXT))])
        command = [sys.executable, "tools/preprocess_data.py", "--input", str(source), "--tokenizer", "bytes"]
        command += ["--output-prefix", str(tmp_path / "p"), "--workers", "2"]
        peaks.append(peak_bytes(command, cwd=ROOT))
    # The text alone is 15 MB more, its ids twice that.
    assert peaks[0] > 50 * MB and peaks[1] < peaks[0] + 10 * MB, peaks
