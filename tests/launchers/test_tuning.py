"""From a pre-trained checkpoint to a tuned one, as a user goes: conversations, then pairs on an adapter."""

import json
import math
from pathlib import Path

import pytest

from tests.launchers.conftest import ZERO3
from tests.launchers.jobs import ROOT, Ended, Job, deepspeed, read_rows

TEMPLATE = "data.chat_template=plain"
SHORT = ["data.seq_length=64", "schedule.warmup_steps=1", "logging.tensorboard=false"]


def tune(launcher: str, folder: Path, num_ranks: int, *overrides: str) -> Ended:
    command = deepspeed(num_ranks, "--deepspeed_config", ZERO3, *SHORT, *overrides)
    command[command.index(str(ROOT / "launchers" / "pretrain.py"))] = str(ROOT / "launchers" / launcher)
    with Job(command, folder) as job:
        return job.wait(280)


def question(a: int, b: int) -> dict[str, str]:
    return {"role": "user", "content": f"What is {a} plus {b}?"}


def answer(number: int) -> dict[str, str]:
    return {"role": "assistant", "content": f"{number}."}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, prefix: str) -> Path:
    """A folder with a pre-trained run, conversations and pairs."""
    folder = tmp_path_factory.mktemp("tuning")
    sums = [(a, b) for a in range(10) for b in range(5)]
    chats = [{"messages": [question(a, b), answer(a + b)]} for a, b in sums]
    pairs = [
        {"prompt": [question(a, b)], "chosen": [answer(a + b)], "rejected": [answer(9)]} for a, b in sums
    ]
    pairs = [pair for pair in pairs if pair["chosen"] != pair["rejected"]]
    answers = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    for name, rows in {"chats": chats, "pairs": pairs, "answers": answers}.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    end = tune(
        "pretrain.py",
        folder,
        2,
        "model.num_hidden_layers=2",
        "model.hidden_size=32",
        "parallel.pp_size=2",
        "data.tokenizer=bytes",
        f"data.train={prefix}",
        "schedule.num_steps=2",
        f"output_dir={folder}/first",
    )
    assert (end.returncode, end.errors) == (0, [])
    return folder


def num_in_adapters(run: Path) -> int:
    """Numbers of the adapters in a run's newest checkpoint."""
    manifest = json.loads((newest_step(run) / "manifest.json").read_text())
    return sum(math.prod(entry["full_shape"]) for entry in manifest["tensors"] if entry["kind"] == "weight")


def newest_step(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


@pytest.mark.timeout(900)  # three runs, one after another
def test_conversations_then_pairs(place: Path):
    chats = f"{place}/chats.jsonl"
    end = tune(
        "finetune.py",
        place,
        2,
        TEMPLATE,
        "parallel.tp_size=2",
        f"checkpoint.start_from={place}/first",
        f"data.train={chats}",
        f"data.validation={chats}",
        "logging.validate_every_steps=4",
        "logging.validation_steps=1",
        "schedule.num_steps=4",
        f"output_dir={place}/tuned",
    )
    assert (end.returncode, end.errors) == (0, [])
    assert "50 sequences" in end.stdout and "starts from the weights of" in end.stdout
    rows = read_rows(place / "tuned")
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["validation_loss"] < rows[0]["loss"]

    options = [
        TEMPLATE,
        "parallel.pp_size=2",
        f"checkpoint.start_from={place}/tuned",
        f"data.train={place}/pairs.jsonl",
        "lora.rank=4",
        "optimizer.learning_rate=0.01",
        f"output_dir={place}/preferred",
    ]
    held_out = [f"data.validation={place}/pairs.jsonl", "logging.validate_every_steps=4"]
    end = tune("prefer.py", place, 2, *options, *held_out, "schedule.num_steps=4")
    assert (end.returncode, end.errors) == (0, [])
    rows = read_rows(place / "preferred")
    assert rows[-1]["consumed_tokens"] == rows[-1]["consumed_samples"] * 2 * 64  # a pair is two rows
    assert (
        f" parameters, frozen; {num_in_adapters(place / 'preferred'):,} more in adapters of rank 4 "
        in end.stdout
    )
    state = json.loads((newest_step(place / "preferred") / "state.json").read_text())
    assert state["consumed_tokens"] == rows[-1]["consumed_tokens"]
    assert rows[-1]["validation_rewards/margins"] > 0.01 and "validation_rewards/margins" not in rows[0]
    margin = f"(margin {rows[-1]['validation_rewards/margins']:.4f}, accuracy "
    assert f"validation loss {rows[-1]['validation_loss']:.4f} {margin}" in end.stdout
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)  # the reference is the start itself
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["rewards/margins"] > 0.01 and rows[-1]["loss"] < rows[0]["loss"]
    assert len(list(place.glob("cache/references-*.npy"))) == 1

    end = tune("prefer.py", place, 2, *options, "schedule.num_steps=6")
    assert (end.returncode, end.errors) == (0, [])
    assert "resumed from" in end.stdout and "log-probabilities of" not in end.stdout
    assert [row["step"] for row in read_rows(place / "preferred")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.timeout(600)  # two runs
def test_single_answers_by_kto(place: Path):
    answers = f"{place}/answers.jsonl"
    options = [
        "preference.loss=kto",
        "preference.desirable_weight=3.0",
        TEMPLATE,
        f"checkpoint.start_from={place}/first",
        f"data.train={answers}",
        "data.seq_length=64",
        "optimizer.learning_rate=0.01",
        f"output_dir={place}/kto",
    ]
    held_out = [f"data.validation={answers}", "logging.validate_every_steps=4", "logging.validation_steps=2"]
    end = tune("prefer.py", place, 2, *options, *held_out, "parallel.pp_size=2", "schedule.num_steps=4")
    assert (end.returncode, end.errors) == (0, [])
    assert "log-probabilities of 64 answers, each twice," in end.stdout  # 4 steps of 16
    rows = read_rows(place / "kto")
    desirable = round(16 * (rows[0]["loss"] - 0.5))  # half of (3 desirable + 1 of the others) / 16
    assert 0 < desirable < 16
    assert rows[0]["loss"] == pytest.approx((16 + 2 * desirable) / 2 / 16, rel=1e-5)
    assert rows[0]["rewards/margins"] == pytest.approx(0, abs=1e-5) and rows[0]["kl"] < 1e-4
    assert rows[-1]["rewards/margins"] > 0.01 and rows[-1]["validation_rewards/margins"] > 0.01
    assert any(row["kl"] > 1e-3 for row in rows)
    assert rows[-1]["consumed_tokens"] == 4 * 16 * 64

    end = tune("prefer.py", place, 2, *options, "parallel.tp_size=2", "schedule.num_steps=6")
    assert (end.returncode, end.errors) == (0, [])
    assert "resumed from" in end.stdout and "log-probabilities of 96 answers" in end.stdout
    assert [row["step"] for row in read_rows(place / "kto")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("launcher", "overrides", "message"),
    [
        ("finetune.py", ["data.train=chats.jsonl"], "checkpoint.start_from is null"),
        ("prefer.py", ["task=finetune", "checkpoint.start_from=first"], "start launchers/finetune.py"),
        ("finetune.py", ["checkpoint.start_from=first"], "data.train is null, and finetune needs"),
        (
            "prefer.py",
            ["checkpoint.start_from=first", "data.train=chats.jsonl", TEMPLATE],
            "nothing to learn from",
        ),
        (
            "prefer.py",
            ["checkpoint.start_from=first", "data.train=pairs.jsonl", TEMPLATE, "preference.loss=kto"],
            "no prompt, completion and label (first: pairs.jsonl line 1",
        ),
        ("prefer.py", ["preference.loss=dpo", "preference.undesirable_weight=2.0"], "belongs to loss kto"),
    ],
)
def test_a_mistake_is_one_line(place: Path, launcher: str, overrides: list[str], message: str):
    end = tune(launcher, place, 1, *overrides, f"output_dir={place}/none")
    assert end.returncode != 0
    assert len(end.errors) == 1 and message in end.errors[0]
