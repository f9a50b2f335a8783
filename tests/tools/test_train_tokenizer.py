import gzip
import json

import pytest

from megalite.data.corpus import read_corpus, write_jsonl
from megalite.tokenizer.load import load_tokenizer
from megalite.tokenizer.train import MIN_VOCAB
from tools import train_tokenizer

END_OF_TEXT = {
    "byte-bpe": ("<|endoftext|>", 0),
    "lillm": ("</s>", 2),
    "sentencepiece-bpe": ("</s>", 2),
    "sentencepiece-unigram": ("</s>", 2),
}
AWKWARD = "\x00日本\U0001f600  two  spaces\r\n\ttab\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "x.jsonl"
    write_jsonl(path, 120_000)
    return path


def train(source, output, kind="byte-bpe", size=500, more=()):
    arguments = ["--input", str(source), "--output", str(output), "--kind", kind, "--vocab-size", str(size)]
    return train_tokenizer.main([*arguments, *more])


@pytest.mark.parametrize("kind", MIN_VOCAB)
def test_the_trained_tokenizer_is_compact_exact_and_loads_in_transformers(tmp_path, source, kind):
    transformers = pytest.importorskip("transformers")
    assert train(source, tmp_path / "t", kind, more=["--model-max-length", "128"]) == 0
    tokenizer = load_tokenizer(tmp_path / "t")
    text = next(read_corpus())[1]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) < 0.7 * len(text.encode())
    assert tokenizer.decode(tokenizer.encode(AWKWARD)) == AWKWARD
    assert tokenizer.vocab_size == 500
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == END_OF_TEXT[kind]
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "t")
    assert loaded.encode(text) == ids and loaded.decode(ids) == text
    assert (loaded.eos_token, loaded.eos_token_id) == END_OF_TEXT[kind] and loaded.model_max_length == 128
    if kind != "byte-bpe":
        assert (loaded.bos_token, loaded.unk_token) == ("<s>", "<unk>")
    assert (tmp_path / "t" / "tokenizer.model").exists() == (kind == "sentencepiece-bpe")
    if kind == "sentencepiece-bpe":
        assert load_tokenizer(tmp_path / "t" / "tokenizer.model").encode(text) == ids


def test_the_lillm_kind_has_the_ids_of_lillms_own_trainer(tmp_path, source):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    assert train(source, tmp_path / "t", "lillm") == 0
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]

    def ids(num_reserved):
        own = Tokenizer(models.BPE())
        own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        own.decoder = decoders.ByteLevel()
        special = ["<unk>", "<s>", "</s>", *(f"<r{i}>" for i in range(num_reserved))]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        own.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
        )
        return [own.encode(text).ids for text in texts]

    assert load_tokenizer(tmp_path / "t").encode_batch(texts) == ids(13) != ids(12)


def test_the_default_size_is_that_of_lillm_and_inputs_may_be_compressed(tmp_path, source, capsys):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    arguments = ["--output", str(tmp_path / "t"), "--max-bytes", "1"]
    assert train_tokenizer.main(["--input", str(tmp_path / "x.jsonl.gz"), *arguments]) == 0
    assert train_tokenizer.build_parser().get_default("vocab_size") == 8192
    assert load_tokenizer(tmp_path / "t").vocab_size > 257 and "byte-bpe tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["byte-bpe", "sentencepiece-bpe"])
def test_training_twice_gives_the_same_files(tmp_path, source, kind):
    for name in ("a", "b"):
        assert train(source, tmp_path / name, kind, size=400, more=["--max-bytes", "50000"]) == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_another_kind_in_the_same_folder_leaves_no_model_behind(tmp_path, source):
    assert train(source, tmp_path / "t", "sentencepiece-bpe") == 0
    assert train(source, tmp_path / "t", "sentencepiece-unigram") == 0
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--vocab-size", "200"], "--vocab-size: expected at least 257 for byte-bpe, found 200"),
        (
            ["--kind", "lillm", "--vocab-size", "271"],
            "--vocab-size: expected at least 272 for lillm, found 271",
        ),
        (["--input", "nowhere.txt"], "nowhere.txt: input: expected a file or a folder, found nothing"),
        (["--json-key", "body"], "line 1: no key 'body'"),
        (
            ["--kind", "sentencepiece-bpe", "--vocab-size", "900000"],
            "sentencepiece could not train 900000 ids",
        ),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(tmp_path, capfd, more, message):
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "some text"}) + "\n")
    assert train(tmp_path / "x.jsonl", tmp_path / "t", size=300, more=more) == 2
    [error] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in error
    assert not (tmp_path / "t").exists() or list((tmp_path / "t").iterdir()) == []
