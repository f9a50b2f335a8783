"""Chat templates, against transformers' own tokenizer of the same folder."""

import json

import pytest
from transformers import AutoTokenizer

from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.load import build_byte_tokenizer, load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)
NAMED = [{"name": "default", "template": TEMPLATE}, {"name": "tools", "template": "no"}]


@pytest.fixture
def folder(tmp_path):
    build_byte_tokenizer().save(tmp_path)
    return tmp_path


def configure(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("place", ["config", "file", "named"])
def test_a_message_is_framed_as_transformers_frames_it(folder, place):
    bos = {"content": "<s>"} if place == "config" else "<s>"
    template = {"config": {"chat_template": TEMPLATE}, "named": {"chat_template": NAMED}, "file": {}}[place]
    configure(folder, bos_token=bos, **template)
    if place == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    framed = load_tokenizer(folder).chat_prompt("hi\nyou")
    assert framed == "<s><user>hi\nyou<|endoftext|><answer>"
    if place != "config":
        theirs = AutoTokenizer.from_pretrained(folder)
        messages = [{"role": "user", "content": "hi\nyou"}]
        assert framed == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_template_of_a_file_goes_into_what_is_saved(folder, tmp_path):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    load_tokenizer(folder).save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").chat_prompt("x").endswith("<user>x<|endoftext|><answer>")


@pytest.mark.parametrize("template", ["{% broken", "{{ raise_exception('no users here') }}"])
def test_a_template_that_does_not_work_is_told_in_one_line(folder, template):
    configure(folder, chat_template=template)
    with pytest.raises(TokenizerError, match=r"its chat template cannot be used: .") as caught:
        load_tokenizer(folder).chat_prompt("x")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_template_says_so():
    with pytest.raises(TokenizerError, match=r"^bytes has no chat template"):
        load_tokenizer("bytes").chat_prompt("x")
