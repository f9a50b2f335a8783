"""Chat templates, against transformers' own rendering and assistant masks of the same tokenizer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megalite.error import UnusableRecordError
from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.load import build_byte_tokenizer
from megalite.tokenizer.template import ChatTemplate, open_template
from megalite.tokenizer.tokenizer import HuggingFaceTokenizer
from tests.tokenizer.chat_tokenizer import build_chat_tokenizer

NAMES = ["chatml", "llama3", "plain"]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who is there?"},
    {"role": "assistant", "content": "It is me.\n\nNobody \U0001f600 "},
    {"role": "user", "content": " How so\u00e9? "},
    {"role": "assistant", "content": "So."},
]
SAID = {
    "chatml": "It is me.\n\nNobody \U0001f600 <|im_end|>\nSo.<|im_end|>\n",
    "llama3": "It is me.\n\nNobody \U0001f600<|eot_id|>So.<|eot_id|>",
    "plain": "It is me.\n\nNobody \U0001f600 <|endoftext|>\nSo.<|endoftext|>\n",
}
CHATML = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho is there?<|im_end|>\n"
    "<|im_start|>assistant\nIt is me.\n\nNobody \U0001f600 <|im_end|>\n"
    "<|im_start|>user\n How so\u00e9? <|im_end|>\n"
    "<|im_start|>assistant\nSo.<|im_end|>\n"
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_chat_tokenizer()


def theirs(tokenizer, template, messages):
    """Ids and assistant mask by transformers alone."""
    chat = PreTrainedTokenizerFast(tokenizer_object=tokenizer.to_backend(), eos_token=tokenizer.eos_token)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = chat.apply_chat_template(messages, chat_template=template.source, **options)
    return found["input_ids"], [bool(bit) for bit in found["assistant_masks"]]


def without_marks(template):
    source = template.source.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    stripped = ChatTemplate(template.tokenizer, source, "stripped")
    assert template.has_marks and not stripped.has_marks
    return stripped


def said(tokenizer, ids, is_learnt):
    return tokenizer.decode([token for token, learnt in zip(ids, is_learnt, strict=True) if learnt])


@pytest.mark.parametrize("name", NAMES)
def test_what_the_assistant_says_to_the_end_of_its_turn_is_learnt(tokenizer, name):
    template = open_template(tokenizer, name)
    for one in (template, without_marks(template)):
        ids, is_learnt = one.encode(MESSAGES)
        assert said(tokenizer, ids, is_learnt) == SAID[name]
        ids, is_learnt = one.encode(MESSAGES, num_prompt_messages=3)
        assert said(tokenizer, ids, is_learnt) == SAID[name][SAID[name].index("So.") :]


def test_a_conversation_is_framed_as_the_template_says(tokenizer):
    assert open_template(tokenizer, "chatml").render(MESSAGES) == CHATML
    prompt = open_template(tokenizer, "plain").render(MESSAGES[:2], add_generation_prompt=True)
    assert prompt == "System:\nBe brief.\nUser:\nWho is there?\nAssistant:\n"


def test_a_token_that_begins_every_text_is_there_once(tokenizer):
    """The tokenizer's own post-processor adds it, and so does the template."""
    begin = tokenizer.token_to_id("<|begin_of_text|>")
    ids, _ = open_template(tokenizer, "llama3").encode(MESSAGES)
    assert ids[0] == begin and ids.count(begin) == 1
    assert tokenizer.to_backend().encode("x").ids[0] == begin


TEXTS = st.text(st.sampled_from("ab I'm\n \u00e9\U0001f600.\u65e5"), max_size=12)
TURNS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(NAMES), turns=TURNS)
def test_ids_and_masks_are_those_of_transformers_and_do_not_need_the_marks(name, turns):
    tokenizer = build_chat_tokenizer()
    template = open_template(tokenizer, name)
    roles = ("user", "assistant")
    messages = [{"role": r, "content": c} for turn in turns for r, c in zip(roles, turn, strict=True)]
    expected = theirs(tokenizer, template, messages)
    assert template.encode(messages) == expected
    assert without_marks(template).encode(messages) == expected


def test_a_token_across_the_beginning_of_an_answer_is_learnt_as_by_transformers(tokenizer):
    """A template may mark from the middle of a word on."""
    source = (
        "{% for m in messages %}{{ m.content[:1] }}{% generation %}{{ m.content[1:] }}|{% endgeneration %}"
    )
    template = ChatTemplate(tokenizer, source + "{% endfor %}", "cut")
    messages = [{"role": "assistant", "content": "me"}]
    ids, is_learnt = template.encode(messages)
    assert (ids, is_learnt) == theirs(tokenizer, template, messages)
    assert tokenizer.decode(ids[:1]) == "me" and is_learnt == [True] * len(ids)


def test_spaces_are_learnt_where_a_post_processor_trims_their_offsets():
    backend = build_byte_tokenizer().to_backend()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = HuggingFaceTokenizer(backend, "trimming", "<|endoftext|>")
    template = ChatTemplate(
        tokenizer, "{% generation %}{{ messages[0].content }}{% endgeneration %}!", "trim"
    )
    ids, is_learnt = template.encode([{"role": "assistant", "content": "  a \n "}])
    assert said(tokenizer, ids, is_learnt) == "  a \n "


def test_nothing_to_learn_is_refused(tokenizer):
    template = open_template(tokenizer, "chatml")
    for one in (template, without_marks(template)):
        with pytest.raises(UnusableRecordError, match=r"^no assistant text"):
            one.encode(MESSAGES[:2])


def test_a_template_whose_turns_change_later_is_refused_in_one_line(tokenizer):
    source = "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}"
    with pytest.raises(
        TokenizerError, match=r"the first 2 messages alone do not begin .* \{% generation %\}"
    ) as caught:
        ChatTemplate(tokenizer, source, "forgetful").encode(MESSAGES[:4])
    assert "\n" not in str(caught.value)
    marked = "{% generation %}" + source + "{% endgeneration %}"
    with pytest.raises(TokenizerError, match="the first 3 messages"):
        ChatTemplate(tokenizer, marked, "forgetful").encode(MESSAGES, num_prompt_messages=3)


def test_messages_that_a_template_does_not_take_are_one_record_s_matter(tokenizer):
    template = ChatTemplate(tokenizer, "{{ raise_exception('no\nusers') }}", "strict")
    with pytest.raises(
        UnusableRecordError, match=r"^messages that chat template strict does not take: no users$"
    ):
        template.encode(MESSAGES)
    with pytest.raises(TokenizerError, match=r"^chat template broken: line 2: ") as caught:
        ChatTemplate(tokenizer, "\n{% broken", "broken").encode(MESSAGES)
    assert not isinstance(caught.value, UnusableRecordError)


def test_a_template_comes_from_a_name_a_file_or_the_tokenizer(tokenizer, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}")
    assert open_template(tokenizer, str(file)).render(MESSAGES) == "Be brief."
    assert open_template(tokenizer) is None
    for own in ("own", [{"name": "tools", "template": "no"}, {"name": "default", "template": "own"}]):
        having = HuggingFaceTokenizer(tokenizer.to_backend(), "x", None, {"chat_template": own})
        assert open_template(having).source == "own"
    with pytest.raises(TokenizerError, match="expected a Jinja file or one of chatml, llama3, plain"):
        open_template(tokenizer, "chatmI")


def test_a_template_of_ours_needs_its_tokens():
    with pytest.raises(
        TokenizerError, match=r"llama3: bytes has no token '<\|begin_of_text\|>': choose 'plain'"
    ):
        open_template(build_byte_tokenizer(), "llama3")
    open_template(build_byte_tokenizer(), "plain")
    nameless = HuggingFaceTokenizer(build_byte_tokenizer().to_backend(), "x", None)
    with pytest.raises(TokenizerError, match="plain: x has no end of text"):
        open_template(nameless, "plain")


def test_a_fingerprint_tells_templates_and_tokenizers_apart(tokenizer):
    prints = {open_template(tokenizer, name).fingerprint for name in NAMES}
    prints.add(open_template(build_byte_tokenizer(), "plain").fingerprint)
    assert len(prints) == 4
    assert open_template(build_byte_tokenizer(), "plain").fingerprint in prints
