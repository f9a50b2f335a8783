"""What can be wrong with data and settings of fine-tuning, as its user meets it: through the launcher.

A record that cannot be used is counted by its reason, with the file and line of the first, and the run goes
on; a setting or a template that cannot be used is one line, and nothing is left behind.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import megalite.training.job  # noqa: F401, what main() imports late, children need not import again
from launchers import finetune, prefer
from tests.checkpoint.llamas import random_llama, save_llama, tiny_run
from tests.launchers.conftest import ZERO3
from tests.launchers.jobs import LAUNCHER_NAMES, Ended, read_rows

ASK, SAY = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
WHY = {"role": "user", "content": "Why?"}
LONG = {"role": "assistant", "content": "long " * 20}
STRICT = "{% if messages[0].content == 'Why?' %}{{ raise_exception('no reasons') }}{% endif %}"
TEMPLATE = STRICT + "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
FINETUNE = [
    ({"messages": [ASK, SAY]}, None),
    ({"messages": [ASK]}, "no assistant turn"),
    ({"messages": [{"role": "robot", "content": "Me."}, SAY]}, "unknown role"),
    ({"prompt": "Who?", "completion": " "}, "empty completion"),
    ({"prompt": [ASK], "completion": []}, "empty completion"),
    ({"messages": [ASK, LONG]}, "more than 32 tokens"),
    ({"messages": [WHY, SAY]}, "messages that chat template strict.jinja does not take"),
    ({"messages": [ASK, SAY]}, None),
]
PREFER = [
    ({"prompt": [ASK], "chosen": [SAY], "rejected": [SAY]}, "equal chosen and rejected"),
    ({"prompt": [ASK], "chosen": [SAY], "rejected": []}, "empty rejected"),
    ({"prompt": "Who?", "chosen": "", "rejected": "Me."}, "empty chosen"),
    ({"prompt": [ASK], "chosen": [ASK], "rejected": [SAY]}, "no assistant turn"),
    ({"prompt": [{"role": "robot", "content": "x"}], "chosen": [SAY], "rejected": [LONG]}, "unknown role"),
    ({"prompt": [ASK], "chosen": [SAY], "rejected": [LONG]}, "more than 32 tokens"),
    ({"prompt": [ASK], "chosen": [SAY], "rejected": [SAY | {"content": "You."}]}, None),
]
LAUNCHERS = {"finetune": (finetune.main, FINETUNE), "prefer": (prefer.main, PREFER)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the command is called: a start, files of records, templates."""
    run = tiny_run()
    save_llama(tmp_path / "start" / "checkpoints", random_llama(run.model), run)
    for name, (_, rows) in LAUNCHERS.items():
        text = "".join(json.dumps(row) + "\n" for row, _ in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "strict.jinja").write_text(TEMPLATE)
    (tmp_path / "broken.jinja").write_text("{% for m in messages %}\n{{ m.content")
    return tmp_path


def call(name: str, folder: Path, *overrides: str) -> Ended:
    """The launcher's main() in a process of its own, which is forked: torch is imported already."""
    arguments = ["--deepspeed_config", ZERO3, "checkpoint.start_from=start", f"data.train={name}.jsonl"]
    arguments += ["data.chat_template=strict.jinja", "data.seq_length=32", "schedule.num_steps=1"]
    arguments += ["schedule.warmup_steps=1", "logging.tensorboard=false", "output_dir=run", *overrides]
    logs = [folder / "stdout", folder / "stderr"]
    process = multiprocessing.get_context("fork").Process(
        target=_child, args=(LAUNCHERS[name][0], arguments, folder, logs)
    )
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, *(log.read_text() for log in logs))


def _child(main: Callable[[list[str]], int], arguments: list[str], folder: Path, logs: list[Path]) -> None:
    for descriptor, log in zip((1, 2), logs, strict=True):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115, pytest's own are elsewhere
    for variable in set(LAUNCHER_NAMES) - {"DS_ACCELERATOR"}:
        os.environ.pop(variable, None)
    os.chdir(folder)
    status = main(arguments)
    sys.stdout.flush()
    os._exit(status)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_records_that_cannot_be_used_are_counted_and_the_run_goes_on(name, folder):
    rows = LAUNCHERS[name][1]
    end = call(name, folder)
    assert (end.returncode, end.errors) == (0, []), end.stderr
    assert [row["step"] for row in read_rows(folder / "run")] == [1]
    [line] = [line for line in end.stdout.splitlines() if line.startswith(f"{name}.jsonl: ")]
    reasons: dict[str, list[int]] = {}
    for number, (_, reason) in enumerate(rows, 1):
        if reason is not None:
            reasons.setdefault(reason, []).append(number)
    assert f"left out {sum(map(len, reasons.values()))} of {len(rows)} records: " in line
    for reason, lines in reasons.items():
        assert f"{len(lines)} with {reason} (first: {name}.jsonl line {lines[0]}" in line


MISTAKES = [
    ("finetune", ["data.chat_template=broken.jinja"], ["finetune.jsonl line 1", "broken.jinja: line 2"]),
    ("finetune", ["data.chat_template=missing"], ["chat template missing", "chatml, llama3, plain"]),
    ("finetune", ["data.chat_template=null"], ["finetune.jsonl line 1", "data.chat_template"]),
    ("finetune", ["data.seq_length=3"], ["nothing to learn from: 8 records", "first: finetune.jsonl line"]),
    ("finetune", ["data.seq_length=128"], ["data.seq_length 128 exceeds model.max_position_embeddings 64"]),
    ("finetune", ["lora.rank=2", "lora.targets=[q_proj,qproj]"], ["lora.targets names 'qproj'", "q_proj, k"]),
    ("prefer", ["lora.rank=2", "lora.targets=[lm_head]"], ["lora.targets names 'lm_head'", "down_proj"]),
    ("prefer", ["lora.rank=2", "lora.targets=[]"], ["lora.targets names nothing", "down_proj"]),
    ("prefer", ["data.train=finetune.jsonl"], ["nothing to learn from", "no chosen and rejected (first: "]),
]


@pytest.mark.parametrize(("name", "overrides", "parts"), MISTAKES, ids=lambda x: str(x)[:40])
def test_what_cannot_serve_is_one_line_and_leaves_no_run(name, overrides, parts, folder):
    end = call(name, folder, *overrides)
    assert end.returncode != 0
    assert end.stderr.startswith("error: ") and end.stderr.count("\n") == 1, end.stderr
    assert all(part in end.stderr for part in parts), end.stderr
    assert not (folder / "run").exists()
