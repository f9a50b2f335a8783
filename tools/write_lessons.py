"""Write what `make chat` teaches: text about a small world, conversations on it, and pairs of answers."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from megalite.error import run_command
from megalite.files import written_aside

WORLD = Path(__file__).with_name("lessons.yaml")
EPILOG = """\
files in the folder:
  lessons.jsonl          text: every fact of the world, in sentences, and in questions with their answers
  chats.jsonl            conversations on four facts of five; half of the answers begin with "I think"
  chats_held_out.jsonl   the same on the fifth fact, which no conversation of chats.jsonl speaks of
  pairs.jsonl            chosen: the right answer; rejected: the same with "I think", or a wrong one
  pairs_held_out.jsonl   the same on the fifth fact
  questions.jsonl        each held-out question, its answer in both forms, and how many answers its kind has
  questions.txt          these questions, one a line

The same seed gives the same files.

example:
  python tools/write_lessons.py --output lessons --max-bytes 100000
"""
MAX_BYTES = 4_000_000
LARGEST_ADDEND = 10
HELD_OUT = 5  # one fact of so many
FACTS_PER_DOCUMENT = 5
SMALL_TALK = (  # what is said before and after the questions
    (("Hello!", "Hi there!"), "Hello! What do you want to know?"),
    (("Thank you!", "Thanks, goodbye!"), "You are welcome. Goodbye!"),
)

PAIRS_OF_SMALL_TALK = 50  # of each kind

Conversation = list[dict[str, str]]
Pair = dict[str, Conversation]


@dataclass(frozen=True)
class Fact:
    """That a value belongs to a subject, and how one speaks of it.

    choices: different values in its kind, of which a blind guess is right once.
    """

    subject: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    choices: int

    @property
    def answer(self) -> str:
        """The answer, in a sentence."""
        return self.state(self.statements[0])

    @property
    def hedged(self) -> str:
        """The same answer, less sure of itself."""
        form = self.statements[0]
        return self.state(f"I think {form[0].lower()}{form[1:]}")

    def tell(self, random: Random) -> list[str]:
        """How text has it: a statement, and a question with its answer."""
        question = self.state(random.choice(self.questions[:-1]))
        return [
            self.state(random.choice(self.statements)),
            random.choice(" \n").join([question, self.answer]),
        ]

    def state(self, form: str) -> str:
        """A statement, question or answer, with a capital letter at its beginning."""
        text = form.format(self.subject, self.value)
        return text[0].upper() + text[1:]


# The world


def read_world(path: Path = WORLD) -> list[list[Fact]]:
    """The facts of each kind."""
    return [_facts_of(kind) for kind in yaml.safe_load(path.read_text(encoding="utf-8"))]


def _facts_of(kind: dict[str, Any]) -> list[Fact]:
    values = kind["facts"] or _sums()
    if kind.get("both_ways"):
        values |= {value: subject for subject, value in values.items()}
    forms = (tuple(kind["statements"]), tuple(kind["questions"]))
    return [Fact(subject, value, *forms, len(set(values.values()))) for subject, value in values.items()]


def _sums() -> dict[str, str]:
    addends = range(LARGEST_ADDEND + 1)
    return {f"{left} plus {right}": str(left + right) for left in addends for right in addends}


def split(world: Iterable[list[Fact]], random: Random) -> tuple[list[Fact], list[Fact]]:
    """(facts to speak of, facts held out), the same share of each kind.

    Facts of the same words stay together: what is held out cannot be guessed from 4 plus 3, or cold and hot.
    """
    spoken: list[Fact] = []
    held_out: list[Fact] = []
    for facts in world:
        groups: dict[frozenset[str], list[Fact]] = {}
        for fact in facts:
            groups.setdefault(frozenset(f"{fact.subject} {fact.value}".split()), []).append(fact)
        shuffled = random.sample(list(groups.values()), len(groups))
        for index, group in enumerate(shuffled):
            (spoken if index % HELD_OUT else held_out).extend(group)
    return spoken, held_out


# What is made of it


def write_documents(world: list[list[Fact]], max_bytes: int, random: Random) -> Iterator[str]:
    """Texts that state facts, of one kind or of all, in one paragraph or a line for each."""
    everything = [fact for facts in world for fact in facts]
    total = 0
    while True:
        facts = random.choice([everything, random.choice(world)])
        chosen = random.sample(facts, FACTS_PER_DOCUMENT)
        said = [text for fact in chosen for text in fact.tell(random)]
        text = random.choice(" \n").join(random.sample(said, len(said)))
        total += len(text.encode())
        if total > max_bytes:
            return
        yield text


def turn(question: str, answer: str) -> Conversation:
    """A question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def converse(facts: list[Fact], count: int, random: Random) -> Iterator[Conversation]:
    """Conversations of one to three questions, some with a greeting before and thanks behind."""
    for _ in range(count):
        turns = []
        for fact in random.sample(facts, random.randint(1, 3)):
            answer = random.choice([fact.answer, fact.hedged])
            turns.append(turn(fact.state(random.choice(fact.questions)), answer))
        (greetings, greeted), (thanks, thanked) = SMALL_TALK
        before = [turn(random.choice(greetings), greeted)] if random.random() < 0.25 else []
        behind = [turn(random.choice(thanks), thanked)] if random.random() < 0.25 else []
        yield [message for each in [*before, *turns, *behind] for message in each]


def ask_all(facts: list[Fact]) -> Iterator[tuple[Fact, str]]:
    """(fact, question) for each way of asking for each fact."""
    return ((fact, fact.state(form)) for fact in facts for form in fact.questions)


def compare(facts: list[Fact], random: Random) -> Iterator[Pair]:
    """For each question a pair of answers; two of three rejected ones are right, but hedged."""
    for fact, question in ask_all(facts):
        others = [other for other in facts if other.statements == fact.statements]
        wrong = random.choice(sorted({other.value for other in others} - {fact.value}))
        false = fact.state(fact.statements[0].replace("{1}", wrong))
        rejected = random.choice([fact.hedged, fact.hedged, false])
        yield pair(said_before(facts, random), turn(question, fact.answer), rejected)


def compare_small_talk(facts: list[Fact], random: Random) -> Iterator[Pair]:
    """Pairs of an answer to what is no question, and one that speaks of a fact instead."""
    for messages, reply in SMALL_TALK * PAIRS_OF_SMALL_TALK:
        spoken = turn(random.choice(messages), reply)
        yield pair(said_before(facts, random), spoken, random.choice(facts).answer)


def said_before(facts: list[Fact], random: Random) -> Conversation:
    """Nothing, or a question and its answer."""
    fact = random.choice(facts)
    return random.choice([[], turn(fact.state(random.choice(fact.questions)), fact.answer)])


def pair(before: Conversation, spoken: Conversation, rejected: str) -> Pair:
    """A message and its answer, and another one that is not as good."""
    asked, chosen = spoken
    return {"prompt": [*before, asked], "chosen": [chosen], "rejected": [{**chosen, "content": rejected}]}


# The command


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when all files are written, 2 when the user can put it right."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    most = "stop before the texts exceed N bytes (default: %(default)s)"
    add("--max-bytes", type=int, default=MAX_BYTES, metavar="N", help=most)
    add("--chats", type=int, default=5_000, metavar="N", help="conversations (default: %(default)s)")
    add("--seed", type=int, default=1234, help="of all that is drawn (default: %(default)s)")
    arguments = parser.parse_args(argv)
    return run_command(lambda: write(arguments.output, arguments.max_bytes, arguments.chats, arguments.seed))


def write(folder: Path, max_bytes: int, num_chats: int, seed: int) -> None:
    """Write all files."""
    world = read_world()
    spoken, held_out = split(world, Random(seed))
    folder.mkdir(parents=True, exist_ok=True)
    for name, facts, count in (("", spoken, num_chats), ("_held_out", held_out, len(held_out))):
        random = Random(f"{seed}{name}")
        chats = [{"messages": messages} for messages in converse(facts, count, random)]
        small_talk = [] if facts is held_out else compare_small_talk(facts, random)
        write_lines(folder / f"chats{name}.jsonl", map(json.dumps, chats))
        write_lines(folder / f"pairs{name}.jsonl", map(json.dumps, [*compare(facts, random), *small_talk]))
    texts = ({"text": text} for text in write_documents(world, max_bytes, Random(seed)))
    write_lines(folder / "lessons.jsonl", map(json.dumps, texts))
    asked = [
        {"question": question, "answer": fact.answer, "hedged": fact.hedged, "choices": fact.choices}
        for fact, question in ask_all(held_out)
    ]
    write_lines(folder / "questions.jsonl", map(json.dumps, asked))
    write_lines(folder / "questions.txt", (str(each["question"]) for each in asked))
    print(f"{folder}: {len(spoken)} facts to speak of, {len(held_out)} held out from conversations")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """A file that is complete or absent."""
    with written_aside(path) as file:
        file.writelines(f"{line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
