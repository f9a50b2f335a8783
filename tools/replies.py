"""What a model replied to questions: found in what was printed, and judged."""

import re
from collections.abc import Sequence
from typing import TypedDict

from tools.journey import JourneyError

MAX_NEW_TOKENS = 40  # three times as many as the longest answer has
ROLE_MARKS = ("User:", "Assistant:", "<|endoftext|>")


class Question(TypedDict):
    """A line of questions.jsonl: a held-out question, its answer in both forms, and how many its kind has."""

    question: str
    answer: str
    hedged: str
    choices: int


def find_replies(printed: str, count: int) -> list[str]:
    """The replies that tools/generate.py printed, each below a line with its prompt."""
    replies = [reply.removesuffix("\n\n") for reply in re.split(r"^==> .* <==\n", printed, flags=re.M)[1:]]
    if len(replies) != count:
        raise JourneyError(f"{len(replies)} replies to {count} questions")
    return replies


def check_form(replies: Sequence[str], lengths_tokens: Sequence[int]) -> None:
    """JourneyError unless each reply is there, ended by itself, and has nothing of the template.

    A reply that did not end has MAX_NEW_TOKENS tokens, of which the same text may take fewer: never half.
    """
    for reply, length_tokens in zip(replies, lengths_tokens, strict=True):
        if not reply.strip() or any(mark in reply for mark in ROLE_MARKS):
            raise JourneyError(f"a reply is {reply!r}: text without marks of the template was promised")
        if length_tokens > MAX_NEW_TOKENS // 2:
            raise JourneyError(f"a reply does not end by itself: {reply!r}")


def check_answers(questions: Sequence[Question], replies: Sequence[str], min_right: float) -> str:
    """A line on the replies, compared letter for letter. JourneyError unless enough are right."""
    pairs = list(zip(questions, replies, strict=True))
    plain = sum(reply == question["answer"] for question, reply in pairs)
    right = plain + sum(reply == question["hedged"] for question, reply in pairs)
    chance = sum(1 / question["choices"] for question in questions) / len(questions)
    text = (
        f"{right} of {len(pairs)} right ({right / len(pairs):.0%}; by chance {chance:.0%}), "
        f"{right - plain} of them with 'I think'"
    )
    if not right >= min_right * len(pairs):
        raise JourneyError(f"{text}: at least {min_right:.0%} were promised")
    return text


def count_hedged(replies: Sequence[str]) -> int:
    """How many begin with what preference tuning is to take away."""
    return sum(reply.startswith("I think") for reply in replies)


def check_hedging(before: int, after: int) -> None:
    """JourneyError unless preference tuning left at most a quarter of the replies that hedge."""
    if not 4 * after <= before:
        raise JourneyError(f"{before} replies with 'I think', and {after} after tuning: few were promised")
