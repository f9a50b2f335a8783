"""What a model goes on from: all that was said, as the template writes it, as far as there is room."""

import pytest

from megalite.error import UnusableRecordError
from megalite.generation.conversation import Conversation
from megalite.generation.error import PromptError
from megalite.tokenizer.load import build_byte_tokenizer
from megalite.tokenizer.template import ChatTemplate, open_template
from tests.checkpoint.llamas import tiny_run

MODEL = tiny_run().model  # 64 tokens, which are bytes
TEMPLATE = open_template(build_byte_tokenizer(), "plain")
END = "<|endoftext|>"


def text_of(tokens: list[int]) -> str:
    return TEMPLATE.tokenizer.decode(tokens)


def conversation(max_new_tokens: int = 8, system: str | None = None) -> Conversation:
    return Conversation(TEMPLATE, MODEL, max_new_tokens, system)


def test_each_message_comes_behind_all_before_it_and_is_to_be_answered():
    talk = conversation(system="S.")
    assert text_of(talk.ask("a")) == "System:\nS.\nUser:\na\nAssistant:\n"
    talk.answer("b")
    assert text_of(talk.ask("c")) == f"System:\nS.\nUser:\na\nAssistant:\nb{END}\nUser:\nc\nAssistant:\n"
    assert not talk.is_cut


def test_a_new_conversation_keeps_the_system_message_alone():
    talk = conversation(system="S.")
    first = talk.ask("a")
    talk.answer("b")
    talk.clear()
    assert talk.ask("a") == first == talk.begin("a")


def test_the_oldest_pairs_go_when_there_is_no_room_and_the_system_message_stays():
    talk = conversation(max_new_tokens=4, system="S.")
    for message, answer in (("a", "b"), ("c", "d")):
        talk.ask(message)
        talk.answer(answer)
    assert not talk.is_cut
    prompt = talk.ask("e")  # 11 tokens of the system, 22 of each pair, 19 of the question
    assert talk.is_cut and len(prompt) == 11 + 22 + 19
    assert text_of(prompt) == f"System:\nS.\nUser:\nc\nAssistant:\nd{END}\nUser:\ne\nAssistant:\n"
    talk.answer("f")
    assert (
        text_of(talk.ask("g" * 20)) == f"System:\nS.\nUser:\n{'g' * 20}\nAssistant:\n"
    )  # both pairs at once
    talk.clear()
    assert not talk.is_cut


def test_a_message_goes_with_its_answer_and_the_reply_has_room():
    talk = conversation(max_new_tokens=4)
    talk.ask("a" * 20)
    talk.answer("b")
    assert text_of(talk.ask("ccc")) == "User:\nccc\nAssistant:\n"  # else 62 of 64 tokens


def test_room_is_used_to_the_last_token():
    frame = len("User:\n\nAssistant:\n")
    assert len(conversation().ask("x" * (64 - 8 - frame))) == 64 - 8
    with pytest.raises(PromptError, match="prompt of 57 tokens and --max-new-tokens 8 exceed the model's"):
        conversation().ask("x" * (64 - 8 - frame + 1))


def test_a_message_that_does_not_fit_has_not_been_said():
    talk = conversation()
    talk.ask("a")
    talk.answer("b")
    for _ in range(2):
        with pytest.raises(PromptError, match="shorten one"):
            talk.ask("x" * 64)
    assert not talk.is_cut
    assert text_of(talk.ask("c")) == f"User:\na\nAssistant:\nb{END}\nUser:\nc\nAssistant:\n"


def test_a_system_message_without_room_or_place_is_refused_at_once():
    with pytest.raises(PromptError, match="max_position_embeddings 64"):
        conversation(system="x" * 64)
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no systems') }}{% endif %}x"
    template = ChatTemplate(build_byte_tokenizer(), source, "strict")
    Conversation(template, MODEL, 8)
    with pytest.raises(UnusableRecordError, match="chat template strict does not take: no systems"):
        Conversation(template, MODEL, 8, "S.")


def test_a_template_that_writes_nothing_is_refused():
    with pytest.raises(UnusableRecordError, match="chat template empty makes no text of"):
        Conversation(ChatTemplate(build_byte_tokenizer(), "", "empty"), MODEL, 8)
