"""A conversation on the command line is the one that transformers has with the exported model.

What it says is compared token for token: float32 logits of these models lie further apart than rounding.
"""

import io
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from megalite.checkpoint.format import step_folder
from megalite.generation import writer
from tests.checkpoint.adapters import LORA, random_factors, save_factors
from tests.generation.talkers import (
    ENDS,
    MAX_NEW_TOKENS,
    MESSAGES,
    Said,
    Talker,
    save_talker,
    talk_to_transformers,
)
from tests.launchers.jobs import ROOT, user_environment
from tools import convert_to_hf, generate

GREEDY = ["--temperature", "0", "--max-new-tokens", str(MAX_NEW_TOKENS)]


def export(source: Path, output: Path, *extra: str) -> Path:
    options = ["--checkpoint", str(source), "--output", str(output), "--dtype", "float32", "--no-verify"]
    assert convert_to_hf.main([*options, *extra]) == 0
    return output


@dataclass
class Room:
    """A folder with talkers, and how they are talked to."""

    folder: Path
    talkers: dict[str, Talker] = field(default_factory=dict)

    def talker(self, template: str) -> Talker:
        """One that was tuned in a shipped template; its export lies in hf."""
        if template not in self.talkers:
            self.talkers[template] = save_talker(self.folder / template, template, end=template)
            export(self.folder / template, self.folder / template / "hf")
        return self.talkers[template]

    def said(self, template: str, *args: Any, **options: Any) -> Said:
        return talk_to_transformers(self.talker(template).folder / "hf", ENDS[template], *args, **options)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Room:
    return Room(tmp_path_factory.mktemp("talkers"))


def talk(monkeypatch, capsys, source: Path, messages: Sequence[str], *extra: str) -> tuple[str, str]:
    """What is printed, and what is told beside it."""
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{message}\n" for message in messages)))
    options = ["--checkpoint", str(source), "--chat", "--device", "cpu", *GREEDY, *extra]
    assert generate.main(options) == 0
    printed = capsys.readouterr()
    return printed.out, printed.err


def lines(said: Said) -> str:
    return "".join(f"{reply}\n" for reply in said.replies)


@pytest.fixture
def recorded(monkeypatch) -> Said:
    """The tokens that the model was given, and those that it chose."""
    record, decode = Said([], [], []), writer.decode

    def recording(stage, prompts, *args):
        record.prompts += prompts
        record.tokens.append([])
        for tokens in decode(stage, prompts, *args):
            record.tokens[-1] += tokens
            yield tokens

    monkeypatch.setattr(writer, "decode", recording)
    return record


@pytest.mark.parametrize("template", ENDS)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_four_turns_are_those_of_transformers_token_for_token(
    room, monkeypatch, capsys, recorded, template, system
):
    expected = room.said(template, system=system)
    assert expected.num_ended >= 1  # some reply stops by itself
    extra = [] if system is None else ["--system", system]
    out, err = talk(monkeypatch, capsys, room.talker(template).folder, MESSAGES, *extra)
    assert (out, err) == (lines(expected), "")
    assert recorded.prompts == expected.prompts
    for mine, theirs in zip(recorded.tokens, expected.tokens, strict=True):
        ended = len(theirs) < MAX_NEW_TOKENS
        assert mine[: len(theirs)] == theirs and len(mine) == len(theirs) + ended  # and the end, not shown


def test_every_source_of_the_same_weights_says_the_same(room, monkeypatch, capsys):
    talker, said = room.talker("chatml"), room.said("chatml")
    sources = [talker.folder, talker.checkpoints, step_folder(talker.checkpoints, 10), talker.folder / "hf"]
    for source in sources:
        assert talk(monkeypatch, capsys, source, MESSAGES) == (lines(said), "")


def test_an_adapter_says_what_its_merged_export_says(room, monkeypatch, capsys):
    """A run of adapters, and its adapter's folder with the base that it names, or one that is named."""
    talker = room.talker("chatml")
    run = talker.run.model_copy(update={"lora": LORA})
    base, tuned = step_folder(talker.checkpoints, 10), talker.folder / "tuned"
    save_factors(tuned, run, base, random_factors(talker.llama))
    merged, peft = export(tuned, tuned / "hf"), export(tuned, tuned / "peft", "--adapter")
    said = talk_to_transformers(merged, ENDS["chatml"])
    assert said.replies != room.said("chatml").replies  # the control
    extras = [[], ["--base", str(talker.folder / "hf")], ["--base", str(talker.folder)]]
    assert talk(monkeypatch, capsys, tuned, MESSAGES) == (lines(said), "")
    for extra in extras:
        assert talk(monkeypatch, capsys, peft, MESSAGES, *extra) == (lines(said), "")


def test_a_message_begins_a_new_conversation_and_an_empty_one_is_none(room, monkeypatch, capsys):
    said = room.said("chatml", MESSAGES[:2])
    script = ["", *MESSAGES[:2], "/new", "  ", *MESSAGES[:2]]
    assert talk(monkeypatch, capsys, room.talker("chatml").folder, script) == (2 * lines(said), "")


def test_each_prompt_is_a_conversation_of_its_own(room, monkeypatch, capsys):
    prompts = [word for message in MESSAGES[:2] for word in ("--prompt", message)]
    out, _ = talk(monkeypatch, capsys, room.talker("llama3").folder, [], *prompts, "--system", "S.")
    replies = [room.said("llama3", [message], system="S.").replies[0] for message in MESSAGES[:2]]
    pairs = zip(MESSAGES, replies, strict=False)
    assert out == "".join(f"==> {message} <==\n{reply}\n\n" for message, reply in pairs)


def test_a_template_by_name_comes_before_the_run_s(room, monkeypatch, capsys):
    folder = room.talker("chatml").folder
    before, _ = talk(monkeypatch, capsys, folder, MESSAGES)
    plain, _ = talk(monkeypatch, capsys, folder, MESSAGES, "--chat-template", "plain")
    shipped = ROOT / "megalite/tokenizer/templates/chatml.jinja"
    assert plain != before
    assert talk(monkeypatch, capsys, folder, MESSAGES, "--chat-template", str(shipped))[0] == before


def test_a_conversation_without_room_is_told_of_and_goes_on(room, monkeypatch, capsys):
    said = room.said("chatml", ["a", "b"])
    long = "x " * 200
    out, err = talk(monkeypatch, capsys, room.talker("chatml").folder, ["a", long, "b"])
    assert out == lines(said)
    [line] = err.splitlines()
    assert line.startswith("error: prompt of ") and "max_position_embeddings 256: shorten one" in line
    out, err = talk(monkeypatch, capsys, room.talker("chatml").folder, ["So. " * 8] * 9)
    assert err == "note: the context is full: the oldest messages are left out from here on\n"


def test_a_reply_appears_as_it_is_made(room, monkeypatch):
    class Screen(io.StringIO):
        def flush(self) -> None:
            shown.append(self.getvalue())

    shown: list[str] = []
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stdin", io.StringIO("Who is there?\n"))
    folder = room.talker("llama3").folder
    assert generate.main(["--checkpoint", str(folder), "--chat", "--device", "cpu", *GREEDY]) == 0
    assert len(set(shown)) > 5
    assert all(late.startswith(early) for early, late in pairwise(shown))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--chat-template", "chatmI"],
            "chat template chatmI: expected a Jinja file or one of chatml, llama3, plain",
        ),
        (["--tokenizer", "bytes"], "chat template chatml: bytes has no token '<|im_start|>'"),
        (["--base", "x"], "--base is x and "),
        (["--chat-template", "BROKEN"], "broken.jinja: line 1: "),
        (["--system", "x" * 300], "max_position_embeddings 256: shorten one"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_read(room, monkeypatch, capsys, extra, message):
    monkeypatch.setattr("sys.stdin", io.StringIO("never\n"))
    broken = room.folder / "broken.jinja"
    broken.write_text("{% broken")
    extra = [str(broken) if word == "BROKEN" else word for word in extra]
    options = ["--checkpoint", str(room.talker("chatml").folder), "--chat", "--device", "cpu"]
    capsys.readouterr()
    assert generate.main([*options, *extra]) == 2
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert line.startswith("error: ") and message in line and printed.out == ""
    assert sys.stdin.read() == "never\n"


def test_without_a_template_one_is_asked_for(tmp_path, capsys):
    save_talker(tmp_path, None)
    assert generate.main(["--checkpoint", str(tmp_path), "--chat", "--device", "cpu"]) == 2
    assert "has no chat template: name a Jinja file or one of " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --prompt --chat is required"),
        (["--prompt", "x", "--system", "S."], "--system is of a conversation: say --chat as well"),
        (["--prompt", "x", "--chat-template", "plain"], "--chat-template is of a conversation"),
    ],
)
def test_options_that_do_not_go_together_are_refused(capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        generate.main(["--checkpoint", "x", *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_on_a_terminal_messages_are_asked_for_and_ctrl_d_ends(room):
    """In a process of its own, whose standard input alone is a terminal."""
    ours, theirs = pty.openpty()
    options = ["--checkpoint", str(room.talker("llama3").folder), "--chat", "--device", "cpu", *GREEDY]
    command = [sys.executable, str(ROOT / "tools/generate.py"), *options]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": user_environment()}
    with subprocess.Popen(command, stdin=theirs, **pipes) as process:
        os.close(theirs)
        os.write(ours, "".join(f"{message}\n" for message in MESSAGES).encode())
        os.write(ours, b"\x04")
        out, err = process.communicate(timeout=200)
        os.close(ours)
    assert process.returncode == 0, err.decode()
    assert out.decode() == lines(room.said("llama3"))
    assert err.decode() == "you> " * 5 + "\n"
