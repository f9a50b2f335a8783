"""Chat templates, against transformers' own tokenizer of the same folder."""

import json

import pytest
from transformers import AutoTokenizer

from megalite.tokenizer.load import build_byte_tokenizer, load_tokenizer
from megalite.tokenizer.template import open_template

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
    messages = [{"role": "user", "content": "hi\nyou"}]
    framed = open_template(load_tokenizer(folder)).render(messages, add_generation_prompt=True)
    assert framed == "<s><user>hi\nyou<|endoftext|><answer>"
    if place != "config":
        theirs = AutoTokenizer.from_pretrained(folder)
        assert framed == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_template_of_a_file_goes_into_what_is_saved(folder, tmp_path):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    load_tokenizer(folder).save(tmp_path / "again")
    assert open_template(load_tokenizer(tmp_path / "again")).source == TEMPLATE
    load_tokenizer(folder).save(tmp_path / "other", chat_template="other")
    assert open_template(load_tokenizer(tmp_path / "other")).source == "other"
