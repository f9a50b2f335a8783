"""The command around llama.cpp's converter, here a stand-in; `make readers` runs the real one."""

import json
import sys

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers, pre_tokenizers

from megalite.data.corpus import read_corpus
from megalite.tokenizer.train import MIN_VOCAB, train_tokenizer
from tools import convert_to_gguf

BASE = """
class TextModel:
    def get_vocab_base_pre(self, tokenizer): return "found out"
    def _set_vocab_gpt2(self): return "gpt2"
    def _set_vocab_sentencepiece(self): return "sentencepiece"

class Experts(TextModel):
    def set_vocab(self): return "glm"
"""
CONVERTER = """
import json, sys
from pathlib import Path
from conversion.base import Experts, TextModel

def get_model_class(name):
    assert name == "Glm4MoeForCausalLM"
    return Experts

def main():
    said = {"pre": TextModel().get_vocab_base_pre(None), "vocab": Experts().set_vocab()}
    said["words"] = sys.argv[1:]
    output = Path(sys.argv[sys.argv.index("--outfile") + 1])
    output.write_text(json.dumps(said))
    if "bf16" in sys.argv:
        raise RuntimeError("in the middle")
"""


@pytest.fixture
def llama_cpp(tmp_path, monkeypatch):
    folder = tmp_path / "llama.cpp"
    (folder / "conversion").mkdir(parents=True)
    (folder / "conversion" / "base.py").write_text(BASE)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    yield folder
    for name in ("convert_hf_to_gguf", "conversion.base", "conversion"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def texts():
    return [text for _, text in read_corpus(max_bytes=100_000)]


@pytest.fixture
def exported(tmp_path, texts):
    def export(kind="byte-bpe", architecture="LlamaForCausalLM"):
        train_tokenizer(kind, texts, 400, tmp_path / "exported")
        (tmp_path / "exported" / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        return tmp_path / "exported"

    return export


def convert(exported, llama_cpp, *more):
    where = ["--model", str(exported), "--llama-cpp", str(llama_cpp)]
    return convert_to_gguf.main([*where, "--output", str(exported.parent / "model.gguf"), *more])


def said(exported):
    return json.loads((exported.parent / "model.gguf").read_text())


@pytest.mark.parametrize("kind", MIN_VOCAB)
def test_only_a_split_as_gpt2s_is_declared_so(exported, llama_cpp, capsys, kind):
    folder = exported(kind)
    if kind == "sentencepiece-unigram":
        assert convert(folder, llama_cpp) == 2
        assert "has a Unigram tokenizer of SentencePiece and no tokenizer.model" in capsys.readouterr().err
        return
    assert convert(folder, llama_cpp, "--type", "f16") == 0
    assert said(folder)["pre"] == ("found out" if kind == "sentencepiece-bpe" else "gpt-2")
    assert said(folder)["vocab"] == "glm"
    words = said(folder)["words"]
    assert words[0] == str(folder) and words[-2:] == ["--outtype", "f16"]


def cut_digits(backend):
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )


def cut_nothing(backend):
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def put_space(backend):
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def normalize(backend):
    backend.normalizer = normalizers.NFC()


@pytest.mark.parametrize("change", [cut_digits, cut_nothing, put_space, normalize])
def test_another_split_is_left_to_the_converter(exported, llama_cpp, change):
    folder = exported()
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    change(backend)
    backend.save(str(folder / "tokenizer.json"))
    assert convert(folder, llama_cpp) == 0
    assert said(folder)["pre"] == "found out"


@pytest.mark.parametrize(("kind", "vocab"), [("byte-bpe", "gpt2"), ("sentencepiece-bpe", "sentencepiece")])
def test_experts_need_no_tokens_of_glm_but_keep_them(exported, llama_cpp, kind, vocab):
    folder = exported(kind, "Glm4MoeForCausalLM")
    assert convert(folder, llama_cpp) == 0
    assert said(folder)["vocab"] == vocab


def test_a_tokenizer_with_glms_tokens_is_read_as_glms(exported, llama_cpp):
    folder = exported(architecture="Glm4MoeForCausalLM")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["[gMASK]", "<|user|>", "<|observation|>"])  # <|endoftext|> is there
    backend.save(str(folder / "tokenizer.json"))
    assert convert(folder, llama_cpp) == 0
    assert said(folder)["vocab"] == "glm"


def test_a_conversion_that_fails_leaves_nothing(exported, llama_cpp):
    folder = exported()
    before = sorted(folder.parent.iterdir())
    with pytest.raises(RuntimeError, match="in the middle"):
        convert(folder, llama_cpp, "--type", "bf16")
    assert sorted(folder.parent.iterdir()) == before


def test_what_cannot_be_converted_is_told_in_one_line(exported, llama_cpp, tmp_path, capsys):
    folder = exported()
    assert convert(folder, tmp_path) == 2
    assert "has no conversion/base.py: expected the source of llama.cpp" in capsys.readouterr().err
    assert convert(folder, llama_cpp, "--output", str(tmp_path / "absent" / "x.gguf")) == 2
    assert "absent is no folder: make it" in capsys.readouterr().err
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert convert(folder, llama_cpp) == 2
    assert "has a tokenizer without merges, which llama.cpp needs" in capsys.readouterr().err
    (folder / "tokenizer.json").write_text("{")
    assert convert(folder, llama_cpp) == 2
    assert "tokenizer.json is not JSON" in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    assert convert(folder, llama_cpp) == 2
    assert "tokenizer.json is missing: name a folder" in capsys.readouterr().err
    assert not (tmp_path / "model.gguf").exists()
