import json
import sys
from pathlib import Path

import pytest

from benchmarks.process_memory import peak_bytes

ROOT = Path(__file__).resolve().parents[2]
MB = 1_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_input(tmp_path):
    text = "memory stays flat, whatever the size of the input is. " * 40
    peaks = []
    for megabytes in (5, 20):
        source = tmp_path / f"{megabytes}.jsonl"
        with source.open("w") as file:
            for number in range(megabytes * MB // len(text)):
                file.write(json.dumps({"text": f"{number} {text}"}) + "\n")
        command = [sys.executable, "tools/preprocess_data.py", "--input", str(source), "--tokenizer", "bytes"]
        command += ["--output-prefix", str(tmp_path / "p"), "--workers", "2"]
        peaks.append(peak_bytes(command, cwd=ROOT))
    assert peaks[0] > 50 * MB and peaks[1] < peaks[0] + 10 * MB, peaks  # ids alone are 2 bytes a character
