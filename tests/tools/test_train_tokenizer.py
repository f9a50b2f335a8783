import json

import pytest

from megalite.data.corpus import read_corpus, write_jsonl
from megalite.tokenizer.tokenizer import load_tokenizer
from tools import train_tokenizer

KINDS = ("byte-bpe", "sentencepiece")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "x.jsonl"
    write_jsonl(path, 120_000)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_tokenizer_is_compact_exact_and_loads_in_transformers(tmp_path, source, kind):
    transformers = pytest.importorskip("transformers")
    arguments = [
        "--input",
        str(source),
        "--output",
        str(tmp_path / "t"),
        "--vocab-size",
        "500",
        "--kind",
        kind,
    ]
    assert train_tokenizer.main([*arguments, "--model-max-length", "128"]) == 0
    tokenizer = load_tokenizer(tmp_path / "t")
    text = next(read_corpus())[1]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < 0.7 * len(text.encode())
    assert tokenizer.vocab_size == 500 and tokenizer.decode([tokenizer.eos_token_id]) in (
        "<|endoftext|>",
        "</s>",
    )
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    assert loaded.encode(text) == ids and loaded.eos_token_id == tokenizer.eos_token_id
    assert loaded.model_max_length == 128
    if kind == "sentencepiece":
        assert load_tokenizer(tmp_path / "t" / "tokenizer.model").encode(text) == ids
    else:
        assert tokenizer.eos_token_id == 0
        assert tokenizer.decode(tokenizer.encode("\x00日本\U0001f600")) == "\x00日本\U0001f600"


def test_training_twice_gives_the_same_tokenizer(tmp_path, source):
    for name in ("a", "b"):
        arguments = ["--input", str(source), "--output", str(tmp_path / name), "--vocab-size", "300"]
        assert train_tokenizer.main([*arguments, "--max-bytes", "50000"]) == 0
    assert load_tokenizer(tmp_path / "a").fingerprint() == load_tokenizer(tmp_path / "b").fingerprint()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--vocab-size", "200"], "--vocab-size: expected at least 257 for byte-bpe, found 200"),
        (["--input", "nowhere.txt"], "nowhere.txt: input: expected a file, found nothing"),
        (["--json-key", "body"], "line 1: no key 'body'"),
        (["--kind", "sentencepiece", "--vocab-size", "900000"], "sentencepiece could not train 900000 ids"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(tmp_path, capfd, more, message):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "some text"}) + "\n")
    arguments = [
        "--input",
        str(tmp_path / "x.jsonl"),
        "--output",
        str(tmp_path / "t"),
        "--vocab-size",
        "300",
        *more,
    ]
    assert train_tokenizer.main(arguments) == 2
    [error] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert not (tmp_path / "t").exists() or list((tmp_path / "t").iterdir()) == []
