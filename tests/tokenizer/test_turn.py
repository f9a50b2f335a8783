"""What ends a reply, read from templates of several makes."""

import pytest
from tokenizers import AddedToken

from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.load import build_byte_tokenizer
from megalite.tokenizer.template import ChatTemplate, open_template
from megalite.tokenizer.tokenizer import HuggingFaceTokenizer, Tokenizer
from megalite.tokenizer.turn import find_turn_end
from tests.tokenizer.chat_tokenizer import build_chat_tokenizer

# As the models of these names write conversations, of users and assistants alone.
MAKES = {
    "zephyr": ("<|{{ m.role }}|>\n{{ m.content }}</s>\n", "</s>"),
    "llama2": (
        "{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %} {{ m.content | trim }} </s>"
        "{% endif %}",
        "</s>",
    ),
    "glm": ("<|{{ m.role }}|>\n{{ m.content }}", "<|user|>"),  # the next turn's token ends the last
    "longest": ("{{ m.content }}<|end|>x", "<|end|>x"),
}


def with_tokens(*tokens: str) -> Tokenizer:
    backend = build_byte_tokenizer().to_backend()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    backend.add_tokens(["\n\n", "  "])  # as GPT-NeoX has them: they end nothing
    return HuggingFaceTokenizer(backend, "made", "<|endoftext|>")


@pytest.mark.parametrize(
    ("name", "token"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("plain", "<|endoftext|>")]
)
def test_a_shipped_template_ends_an_answer_with_its_token(name, token):
    tokenizer = build_chat_tokenizer()
    end = find_turn_end(open_template(tokenizer, name))
    assert end.token_ids == {tokenizer.token_to_id(token)} and not end.texts


@pytest.mark.parametrize("make", MAKES)
def test_the_first_special_token_behind_a_reply_ends_it(make):
    source, token = MAKES[make]
    tokenizer = with_tokens("<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>", "<|end|>x")
    end = find_turn_end(ChatTemplate(tokenizer, f"{{% for m in messages %}}{source}{{% endfor %}}", make))
    assert end.token_ids == {tokenizer.token_to_id(token)} and not end.texts


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("{{ m.role }}: {{ m.content }}\n", ("\nuser: ",)),
        ("{{ m.role }}: {{ m.content }} [END]<|endoftext|>", (" [END]",)),
        ("{{ m.content }}\n\n", ()),  # a reply of two paragraphs looks as two turns
    ],
)
def test_without_a_token_the_text_behind_a_reply_ends_it(source, texts):
    template = ChatTemplate(with_tokens(), f"{{% for m in messages %}}{source}{{% endfor %}}", "text")
    end = find_turn_end(template)
    assert not end.token_ids and end.texts == texts


def test_a_template_of_one_message_is_refused_in_one_line():
    source = "{% if messages | length > 1 %}{{ raise_exception('one message') }}{% endif %}x"
    with pytest.raises(
        TokenizerError, match=r"^chat template single takes no conversation: .*: one message$"
    ):
        find_turn_end(ChatTemplate(build_byte_tokenizer(), source, "single"))
