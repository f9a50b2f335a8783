import json
import shutil

import pytest

from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.load import build_byte_tokenizer, load_tokenizer


@pytest.fixture
def folder(tmp_path):
    build_byte_tokenizer().save(tmp_path / "bytes")
    return tmp_path / "bytes"


@pytest.fixture
def hub(tmp_path, folder, monkeypatch):
    """A cache as the Hub's client keeps it, with one tokenizer in it, and no way to the Hub itself."""
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    place = cache / "models--someone--tokenizer"
    shutil.copytree(folder, place / "snapshots" / "abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def test_a_name_on_the_hub_is_loaded_and_its_file_loads_again(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer("someone/tokenizer")
    assert tokenizer.encode("ab") == [97, 98] and tokenizer.eos_token_id == 256
    assert load_tokenizer(tokenizer.name).fingerprint() == tokenizer.fingerprint()
    assert load_tokenizer("someone/tokenizer", "a").eos_token_id == 97


@pytest.mark.parametrize("name", ["someone/other", "other", "not a name!", "a/b/c", "/no/where", "x.model"])
def test_a_name_that_is_nowhere_is_refused_in_one_line(hub, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TokenizerError, match="no such file or folder") as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_folder_of_vocabulary_and_merges_is_read_through_transformers(tmp_path, folder):
    pytest.importorskip("transformers")
    content = json.loads((folder / "tokenizer.json").read_text())
    old = tmp_path / "old"
    old.mkdir()
    vocabulary = {**content["model"]["vocab"], "<|endoftext|>": 256}
    (old / "vocab.json").write_text(json.dumps(vocabulary))
    (old / "merges.txt").write_text("#version: 0.2\n")
    (old / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = load_tokenizer(old)
    assert tokenizer.encode("é a") == list("é a".encode()) and tokenizer.eos_token_id == 256
    assert load_tokenizer(tokenizer.name, "a").eos_token_id == 97
