import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.load import build_byte_tokenizer, load_tokenizer

TEXT = "héllo 日本\x00\U0001f600\r\n\tdef f(x):  return  x\n"


@pytest.fixture
def folder(tmp_path):
    build_byte_tokenizer().save(tmp_path / "bytes", model_max_length=256)
    return tmp_path / "bytes"


def edit_config(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_bytes_are_their_own_ids():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode(TEXT) == list(TEXT.encode()) and tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.decode([256])) == (
        257,
        256,
        "<|endoftext|>",
    )
    assert tokenizer.encode(bytes(range(128)).decode()) == list(range(128))


def test_a_batch_equals_its_texts_one_by_one():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode_batch(["ab", "", "c"]) == [tokenizer.encode(text) for text in ("ab", "", "c")]
    assert tokenizer.encode_batch([]) == []


def test_a_saved_folder_loads_in_transformers(folder):
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded.encode(TEXT) == list(TEXT.encode()) and loaded.decode(loaded.encode(TEXT)) == TEXT
    assert (len(loaded), loaded.eos_token_id, loaded.model_max_length) == (257, 256, 256)


def test_a_saved_folder_holds_two_files_and_loads_as_folder_and_as_file(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    fingerprints = {
        load_tokenizer(path).fingerprint() for path in (folder, folder / "tokenizer.json", "bytes")
    }
    assert len(fingerprints) == 1


def test_special_tokens_of_the_config_survive_loading_and_saving(folder, tmp_path):
    edit_config(folder, bos_token={"content": "<|endoftext|>"}, chat_template="{{ messages }}", added="no")
    load_tokenizer(folder).save(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert config["bos_token"] == "<|endoftext|>" and config["chat_template"] == "{{ messages }}"
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and "added" not in config


def test_the_config_names_the_end_of_text_as_text_or_object(folder):
    for eos in ("a", {"content": "a"}):
        edit_config(folder, eos_token=eos)
        assert load_tokenizer(folder).eos_token_id == ord("a")
    assert load_tokenizer(folder, eos_token="b").eos_token_id == ord("b")


def test_an_end_of_text_that_does_not_exist_is_refused(folder):
    with pytest.raises(TokenizerError, match="eos token '</eos>' is not in the vocabulary"):
        load_tokenizer(folder, eos_token="</eos>")
    edit_config(folder, eos_token="</config>")
    with pytest.raises(TokenizerError, match="eos token '</config>' is not in the vocabulary"):
        load_tokenizer(folder)


def test_an_ambiguous_end_of_text_must_be_named(folder):
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["</s>"])
    folder.joinpath("tokenizer_config.json").unlink()
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("x") == [120]
    with pytest.raises(TokenizerError, match="no end-of-text token is known: name it"):
        _ = tokenizer.eos_token_id
    assert load_tokenizer(folder, "</s>").eos_token_id == 257


def test_truncation_padding_and_special_tokens_of_the_file_are_not_applied(folder):
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    backend.save(str(folder / "tokenizer.json"))
    assert backend.encode("abcdef").ids != list(b"abcdef")
    assert load_tokenizer(folder).encode_batch(["abcdef", "a"]) == [list(b"abcdef"), list(b"a")]


@pytest.mark.parametrize(
    ("template", "bos", "eos"),
    [("$A", False, False), ("<s> $A", True, False), ("$A </s>", False, True), ("<s> $A </s>", True, True)],
)
def test_the_config_says_which_tokens_tokenizer_json_adds(folder, tmp_path, template, bos, eos):
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 257), ("</s>", 258)])
    backend.save(str(folder / "tokenizer.json"))
    edit_config(folder, bos_token={"content": "<s>"}, eos_token="</s>")
    load_tokenizer(folder).save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert (config["add_bos_token"], config["add_eos_token"]) == (bos, eos)
    loaded = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.encode("a") == backend.encode("a").ids


def test_holes_in_the_ids_count_in_the_vocabulary_size(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["extra"] = 300
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(folder).vocab_size == 301


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{\n}")
    (tmp_path / "x.txt").touch()
    (tmp_path / "x.model").write_bytes(b"no model")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("missing", "no such file or folder"),
        ("empty", "no tokenizer.json"),
        ("x.txt", "found '.txt'"),
        ("tokenizer.json", "not a tokenizer.json that tokenizers reads"),
        ("x.model", "not a SentencePiece model"),
    ):
        with pytest.raises(TokenizerError, match=message) as caught:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_config_of_another_tokenizer_is_refused(folder):
    edit_config(folder, added_tokens_decoder={"256": {"content": "<|endoftext|>"}})
    assert load_tokenizer(folder).eos_token_id == 256
    for index, content in (("255", "<|endoftext|>"), ("256", "</s>"), ("256", None)):
        edit_config(folder, added_tokens_decoder={index: {"content": content}})
        with pytest.raises(TokenizerError, match=f"with id {index} as in tokenizer_config.json, found id"):
            load_tokenizer(folder)
