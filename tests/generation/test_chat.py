"""Messages come in line by line, and waiting for one keeps nobody else waiting."""

import io
import os
from queue import Empty

import pytest

from megalite.generation import chat
from megalite.generation.chat import converse, next_prompt
from megalite.generation.error import PromptError
from megalite.generation.inbox import Inbox
from tests.checkpoint.worlds import run_world
from tests.generation.test_conversation import conversation, text_of

PATIENCE_SECONDS = 20.0  # longer than any thread here takes


def lines_of(inbox: Inbox) -> list[str]:
    return list(iter(lambda: inbox.next(PATIENCE_SECONDS), None))


def test_lines_come_without_their_ends():
    asked: list[int] = []
    inbox = Inbox(io.StringIO("a\n\n b \nc"), lambda: asked.append(1))
    assert asked == []
    assert lines_of(inbox) == ["a", "", " b ", "c"]
    assert len(asked) == 5  # the last time, nothing came


def test_waiting_ends_in_time_and_a_line_is_asked_for_once():
    reader, writer = os.pipe()
    asked: list[int] = []
    with os.fdopen(reader) as stream, os.fdopen(writer, "w") as other_end:
        inbox = Inbox(stream, lambda: asked.append(1))
        for _ in range(2):
            with pytest.raises(Empty):
                inbox.next(0.01)
        print("late", file=other_end, flush=True)
        assert inbox.next(PATIENCE_SECONDS) == "late"
        assert len(asked) == 1
        other_end.close()
        assert inbox.next(PATIENCE_SECONDS) is None


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the second under the locale C
def test_bytes_that_are_no_text_are_told(errors):
    stream = io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8", errors=errors)
    inbox = Inbox(stream, lambda: None)
    with pytest.raises(PromptError, match="standard input cannot be read: 'utf-8' codec"):
        inbox.next(PATIENCE_SECONDS)


class Scripted:
    """An inbox that gives what it is told to, an Empty included."""

    def __init__(self, *lines: str | Empty | None) -> None:
        self.lines = list(lines)

    def next(self, seconds: float) -> str | None:
        line = self.lines.pop(0)
        if isinstance(line, Empty):
            raise line
        return line


def test_what_is_no_message_has_no_answer():
    talk, told = conversation(), []
    inbox = Scripted(Empty(), "", "  ", "a", "/new", "x" * 64, "c", None)
    given = [next_prompt(talk, inbox, told.append) for _ in range(8)]
    texts = [prompt and text_of(prompt) for prompt in given]
    assert texts == [[], [], [], "User:\na\nAssistant:\n", [], [], "User:\nc\nAssistant:\n", None]
    assert len(told) == 1 and told[0].startswith("error: prompt of 82 tokens and --max-new-tokens 8 exceed")


def test_a_full_context_is_told_once_in_each_conversation():
    talk, told = conversation(), []

    def say(*messages: str) -> None:
        for message in messages:
            assert next_prompt(talk, Scripted(message), told.append)
            talk.answer("b" * 10)

    say("a" * 10)
    assert told == []
    say(*"cde")
    assert told == ["note: the context is full: the oldest messages are left out from here on"]
    assert next_prompt(talk, Scripted(chat.NEW), told.append) == []
    say("a" * 10, *"cd")
    assert len(told) == 2


def test_all_processes_answer_what_the_first_one_reads():
    """Only the first has lines and a conversation; while none comes, the others are told so and stay."""

    class Writer:
        def __init__(self) -> None:
            self.prompts: list[str] = []

        def write(self, prompts, printer):
            self.prompts += map(text_of, prompts)
            return [type("Reply", (), {"text": "b"})()]

    def body(rank: int, gather) -> list[str]:
        place = chat.Place(device="cpu", rank=rank, world_size=2, gather=gather)
        inbox = Scripted(Empty(), "a", Empty(), "c", None) if rank == 0 else Scripted()
        writer = Writer()
        converse(writer, conversation() if rank == 0 else None, inbox, lambda line: None, place)
        return writer.prompts

    first, second = run_world(2, body)
    assert first == second
    assert len(first) == 2 and first[1].startswith(first[0] + "b<|endoftext|>\nUser:\nc\n")
