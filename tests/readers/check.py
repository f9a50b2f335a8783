"""Exported folders read by others: makes folders and an environment per reader, and prints who agrees.

    python -m tests.readers.check                        # as `make readers`: transformers 4 and 5, llama.cpp
    python -m tests.readers.check --readers vllm --folders qwen2 sharded

A cell is the largest difference of a logit from megalite's, over the largest logit, in float32; what else
differs stands beside it. What is known to differ must do so. The exit status is 0 when all is as expected.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.readers.environments import REQUIREMENTS, llama_cpp_source, make_environment, version
from tests.readers.folders import KINDS, make_folders

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TOLERANCE = 1e-5  # float32 numbers, added and rotated in another order; a wrong flag is off by more than 1e-3
ALONE = "llama.cpp-alone"  # without tools/convert_to_gguf.py around its converter
READERS = (*REQUIREMENTS, ALONE)
SENTENCEPIECE = ("dense-llama3-rope", "dense-begin-of-text")
NOT_RECOGNIZED = "BPE pre-tokenizer was not recognized"
REFUSED = {
    ("llama.cpp", "dense-bytes"): "tokenizer without merges",
    ("llama.cpp", "dense-wide-heads"): "Unigram tokenizer",
} | {(ALONE, name): NOT_RECOGNIZED for name in KINDS if name not in SENTENCEPIECE}
# AutoTokenizer takes Qwen2Tokenizer for the class, and so Qwen's way to cut words, whatever the folder says.
DIFFERS = {("transformers-5", "qwen2"): {"encode"}, ("vllm", "qwen2"): {"encode"}}

Outcome = dict[str, Any]  # of a reader's script, or {"refused": its last words}


def main(argv: list[str] | None = None) -> int:
    """Make, read and compare; 0 when every reader did what is expected."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    default = [reader for reader in READERS if reader != "vllm"]
    add = parser.add_argument
    readers = f"of {', '.join(READERS)} (default: all but vllm)"
    add("--readers", nargs="+", choices=READERS, default=default, metavar="READER", help=readers)
    add("--folders", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME")
    place = "where folders and environments are made"
    add("--root", type=Path, default=ROOT / "build" / "readers", help=place)
    arguments = parser.parse_args(argv)
    folders = make_folders(arguments.root / "folders", arguments.folders)
    rows, wrong = {}, 0
    for reader in arguments.readers:
        name, outcomes = read(reader, arguments.root / "environments", folders)
        told = {folder: judge(reader, folder, outcome) for folder, outcome in outcomes.items()}
        wrong += sum(not expected for _, expected in told.values())
        rows[name] = {folder: text for folder, (text, _) in told.items()}
    print(table(rows, [folder.name for folder in folders]))
    print(f"{wrong} not as expected" if wrong else "all as expected")
    return min(wrong, 1)


def read(reader: str, environments: Path, folders: list[Path]) -> tuple[str, dict[str, Outcome]]:
    """What a reader says of every folder; its name and version."""
    print(f"reading: {reader}", file=sys.stderr, flush=True)
    environment = "llama.cpp" if reader == ALONE else reader
    python = make_environment(environments, environment)
    name = version(python, environment) + (", its converter alone" if reader == ALONE else "")
    if environment != "llama.cpp":
        script = HERE / f"read_{environment.partition('-')[0]}.py"
        # vLLM leaves a process with its engine: a process for each folder
        groups = [[folder] for folder in folders] if reader == "vllm" else [folders]
        return name, {key: value for group in groups for key, value in run(python, script, group).items()}
    source, outcomes = llama_cpp_source(environments), {}
    for folder in folders:
        gguf = folder / "model.gguf"
        done = convert(source, folder / "exported", gguf, alone=reader == ALONE)
        if done.returncode:
            outcomes[folder.name] = {"refused": done.stderr.strip().splitlines()[-1]}
        else:
            outcomes |= run(python, HERE / "read_llama_cpp.py", [gguf, folder])
    return name, outcomes


def convert(source: Path, exported: Path, gguf: Path, *, alone: bool) -> subprocess.CompletedProcess[str]:
    """Make a GGUF file in float32, by llama.cpp's converter alone or by ours around it."""
    gguf.unlink(missing_ok=True)
    if alone:
        words = [source / "convert_hf_to_gguf.py", exported, "--outfile", gguf, "--outtype", "f32"]
    else:
        where = ["--model", exported, "--llama-cpp", source, "--output", gguf]
        words = [ROOT / "tools" / "convert_to_gguf.py", *where, "--type", "f32"]
    return subprocess.run([sys.executable, *words], capture_output=True, text=True)


def run(python: Path, script: Path, arguments: list[Path]) -> dict[str, Outcome]:
    """A reader's script: its lines, by folder. What it says besides is shown when it fails."""
    done = subprocess.run([python, script, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise SystemExit(f"{script.name} ended with {done.returncode}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"folder"')]
    return {line.pop("folder"): line for line in lines}


def judge(reader: str, folder: str, outcome: Outcome) -> tuple[str, bool]:
    """The cell of the table, and whether it is as expected."""
    expected = REFUSED.get((reader, folder))
    if "refused" in outcome:
        as_expected = expected is not None and expected in outcome["refused"]
        return "refused" if as_expected else f"refused: {outcome['refused']}", as_expected
    differs = {name for name, value in outcome.items() if value is False}
    texts = [
        f"{outcome['logits']:.1e}",
        *(f"{name} differs" for name in sorted(differs)),
        *outcome["loading"],
    ]
    near = outcome["logits"] <= TOLERANCE and not outcome["loading"]
    return ", ".join(texts), near and expected is None and differs == DIFFERS.get((reader, folder), set())


def table(rows: dict[str, dict[str, str]], folders: list[str]) -> str:
    """Markdown: a row for each folder, a column for each reader."""
    lines = [["folder", *rows], ["---"] * (1 + len(rows))]
    lines += [[folder, *(cells[folder] for cells in rows.values())] for folder in folders]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
