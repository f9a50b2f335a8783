"""The small world and what is made of it: what is held out stays out, and answers are right."""

import json
import re
from random import Random

import pytest

from tools import write_lessons

FILES = ["chats", "chats_held_out", "lessons", "pairs", "pairs_held_out", "questions"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lessons")
    assert write_lessons.main(["--output", str(folder), "--max-bytes", "400000", "--chats", "400"]) == 0
    return folder


def records(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def said_by(role, conversations):
    return [message["content"] for each in conversations for message in each if message["role"] == role]


def test_every_sum_is_what_it_is():
    [sums, *_] = write_lessons.read_world()
    assert len(sums) == 121
    for fact in sums:
        left, right = map(int, fact.subject.split(" plus "))
        assert int(fact.value) == left + right
    assert sums[0].choices == 21  # 0 to 20


def test_a_subject_has_one_value_and_a_question_one_answer():
    facts = [fact for kind in write_lessons.read_world() for fact in kind]
    asked = [question for _, question in write_lessons.ask_all(facts)]
    assert len(set(asked)) == len(asked) == 3 * len(facts)


def test_opposites_are_opposites_both_ways():
    facts = {fact.subject: fact.value for kind in write_lessons.read_world() for fact in kind}
    assert facts["hot"] == "cold" and facts["cold"] == "hot"


def test_sentences_begin_with_a_capital_letter():
    forms = (("{0} says {1}.",), ("What does {0} say?",))
    fact = write_lessons.Fact("an owl", "hoot", *forms, 9)
    assert (fact.answer, fact.hedged) == ("An owl says hoot.", "I think an owl says hoot.")
    assert fact.state(fact.questions[0]) == "What does an owl say?"


def test_a_fifth_of_each_kind_is_held_out_and_facts_of_the_same_words_together():
    world = write_lessons.read_world()
    spoken, held_out = write_lessons.split(world, Random(3))
    assert sorted(map(id, [*spoken, *held_out])) == sorted(id(fact) for facts in world for fact in facts)
    for facts in world:
        assert 0.15 < sum(fact in held_out for fact in facts) / len(facts) < 0.3
    words = {frozenset(f"{fact.subject} {fact.value}".split()) for fact in spoken}
    for fact in held_out:
        assert frozenset(f"{fact.subject} {fact.value}".split()) not in words


def test_no_conversation_or_pair_speaks_of_what_is_held_out(folder):
    held_out = {each["question"] for each in records(folder, "questions")}
    chats = [record["messages"] for record in records(folder, "chats")]
    pairs = [record["prompt"] for record in records(folder, "pairs")]
    assert not held_out & {*said_by("user", chats), *said_by("user", pairs)}
    answers = {each["answer"] for each in records(folder, "questions")}
    assert not answers & set(said_by("assistant", chats))
    assert held_out >= set(
        said_by("user", [record["prompt"] for record in records(folder, "pairs_held_out")])
    )


def test_texts_state_what_is_held_out_but_never_ask_as_a_user_alone_does(folder):
    texts = " ".join(record["text"] for record in records(folder, "lessons"))
    questions = records(folder, "questions")
    assert all(each["answer"] in texts for each in questions)
    assert not any(each["question"] in texts for each in questions[2::3])  # the last of three ways


def test_conversations_alternate_and_half_of_their_answers_are_hedged(folder):
    chats = [record["messages"] for record in records(folder, "chats")]
    for messages in chats:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    answers = [
        answer for answer in said_by("assistant", chats) if "welcome" not in answer and "want" not in answer
    ]
    assert 0.45 < sum(answer.startswith("I think ") for answer in answers) / len(answers) < 0.6


def test_the_chosen_answer_is_right_and_the_rejected_one_is_not_or_is_hedged(folder):
    facts = [fact for kind in write_lessons.read_world() for fact in kind]
    answers = {question: fact for fact, question in write_lessons.ask_all(facts)}
    pairs = [*records(folder, "pairs"), *records(folder, "pairs_held_out")]
    on_facts = [pair for pair in pairs if pair["prompt"][-1]["content"] in answers]
    hedged = 0
    for pair in on_facts:
        [*_, asked], [chosen], [rejected] = pair["prompt"], pair["chosen"], pair["rejected"]
        fact = answers[asked["content"]]
        assert chosen == {"role": "assistant", "content": fact.answer}
        if rejected["content"] == fact.hedged:
            hedged += 1
        else:
            form = re.escape(fact.answer.removesuffix(f"{fact.value}."))
            assert re.fullmatch(form + r".+\.", rejected["content"]), rejected
            assert rejected["content"] != fact.answer
    assert 0.6 < hedged / len(on_facts) < 0.75
    assert len(on_facts) == len(answers)


def test_pairs_follow_another_question_or_none_and_some_are_small_talk(folder):
    pairs, replies = records(folder, "pairs"), {reply for _, reply in write_lessons.SMALL_TALK}
    assert 0.4 < sum(len(pair["prompt"]) == 3 for pair in pairs) / len(pairs) < 0.6
    for pair in pairs:
        roles = [message["role"] for message in pair["prompt"]]
        assert roles in (["user"], ["user", "assistant", "user"])
    small_talk = [pair for pair in pairs if pair["chosen"][0]["content"] in replies]
    assert len(small_talk) == 2 * write_lessons.PAIRS_OF_SMALL_TALK
    assert not any(pair["rejected"][0]["content"] in replies for pair in small_talk)
    held_out = records(folder, "pairs_held_out")
    assert not any(pair["chosen"][0]["content"] in replies for pair in held_out)


def test_questions_are_the_same_in_both_files(folder):
    lines = (folder / "questions.txt").read_text().splitlines()
    assert lines == [each["question"] for each in records(folder, "questions")]


def test_the_same_seed_gives_the_same_files_and_another_one_others(folder, tmp_path):
    options = ["--max-bytes", "400000", "--chats", "400"]
    for name, seed in (("same", "1234"), ("other", "1")):
        assert write_lessons.main(["--output", str(tmp_path / name), *options, "--seed", seed]) == 0
    for name in FILES:
        expected = (folder / f"{name}.jsonl").read_bytes()
        assert (tmp_path / "same" / f"{name}.jsonl").read_bytes() == expected
        assert (tmp_path / "other" / f"{name}.jsonl").read_bytes() != expected


def test_texts_are_no_longer_than_asked(folder):
    total = sum(len(record["text"].encode()) for record in records(folder, "lessons"))
    assert 399_000 < total <= 400_000


def test_what_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert write_lessons.main(["--output", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
