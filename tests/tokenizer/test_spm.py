import json
import random

import pytest
import sentencepiece

from megalite.data.corpus import read_corpus
from megalite.tokenizer import spm
from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.load import build_byte_tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def text():
    return "".join(content for _, content in read_corpus(max_bytes=200_000))


@pytest.fixture(scope="module")
def train(tmp_path_factory, text):
    def train(kind, **options):
        prefix = tmp_path_factory.mktemp("spm") / kind
        keep = {
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "byte_fallback": True,
        }
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(text[:60_000].splitlines()), model_prefix=str(prefix), vocab_size=500,
            model_type=kind, minloglevel=2, num_threads=1, **{**keep, **options},
        )  # fmt: skip
        return prefix.with_suffix(".model")

    return train


@pytest.fixture(scope="module")
def model(train):
    return train("bpe")


def test_ids_are_those_of_sentencepiece(model, text):
    tokenizer = load_tokenizer(model)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert tokenizer.encode(text[:2000]) == processor.encode(text[:2000])
    assert tokenizer.decode(tokenizer.encode("  a  b\n")) == "  a  b\n"
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.token_to_id("</s>")) == (500, 2, 2)
    assert load_tokenizer(model, eos_token="<s>").eos_token_id == 1
    with pytest.raises(TokenizerError, match="eos token '<end>' is not in the vocabulary"):
        load_tokenizer(model, eos_token="<end>")


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}, {"split_digits": True}])
def test_the_saved_tokenizer_gives_the_same_ids(train, tmp_path, text, options):
    tokenizer = load_tokenizer(train("bpe", **options))
    tokenizer.save(tmp_path)
    twin = load_tokenizer(tmp_path)
    draw = random.Random(0)
    for _ in range(200):
        start = draw.randrange(len(text) - 300)
        part = text[start : start + draw.randrange(1, 300)]
        assert twin.encode(part) == tokenizer.encode(part)
    assert twin.eos_token_id == 2 and twin.fingerprint() != tokenizer.fingerprint()


def test_the_saved_tokenizer_loads_in_transformers(model, tmp_path, text):
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(model)
    tokenizer.save(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode(text[:3000]) == tokenizer.encode(text[:3000])
    assert (loaded.eos_token, loaded.bos_token, loaded.unk_token) == ("</s>", "<s>", "<unk>")


def test_the_model_itself_is_saved_too_and_goes_on_from_folder_to_folder(model, tmp_path):
    """llama.cpp needs the scores of the pieces, which tokenizer.json has not."""
    load_tokenizer(model).save(tmp_path / "first")
    load_tokenizer(tmp_path / "first").save(tmp_path / "second")
    for folder in ("first", "second"):
        saved = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / folder / "tokenizer.model"))
        original = sentencepiece.SentencePieceProcessor(model_file=str(model))
        assert [saved.GetScore(index) for index in range(500)] == [
            original.GetScore(index) for index in range(500)
        ]
    build_byte_tokenizer().save(tmp_path / "second")
    assert not (tmp_path / "second" / "tokenizer.model").exists()


def test_a_model_beside_another_tokenizer_json_is_refused(train, model, tmp_path):
    load_tokenizer(train("bpe", add_dummy_prefix=False, unk_piece="<other>")).save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    with pytest.raises(TokenizerError, match="expected '<unk>' as id 0, found '<other>'"):
        load_tokenizer(tmp_path).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokens_added_to_the_pieces_are_told_in_the_config(model, tmp_path):
    load_tokenizer(model).save(tmp_path / "first")
    backend = load_tokenizer(tmp_path / "first").to_backend()
    backend.add_special_tokens(["<|user|>"])
    backend.add_tokens(["<|later|>"])
    backend.save(str(tmp_path / "first" / "tokenizer.json"))
    load_tokenizer(tmp_path / "first").save(tmp_path / "second")
    config = json.loads((tmp_path / "second" / "tokenizer_config.json").read_text())
    told = {
        index: (token["content"], token["special"]) for index, token in config["added_tokens_decoder"].items()
    }
    assert told == {"500": ("<|user|>", True), "501": ("<|later|>", False)}
    loaded = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "second")
    assert loaded.encode("<|user|>a b<|later|>") == backend.encode("<|user|>a b<|later|>").ids


@pytest.mark.parametrize("prefix", [True, False])
def test_the_config_says_what_llama_cpp_takes_from_it(train, tmp_path, prefix):
    load_tokenizer(train("bpe", add_dummy_prefix=prefix)).save(tmp_path / "first")
    load_tokenizer(tmp_path / "first").save(tmp_path / "second")
    for folder in ("first", "second"):
        config = json.loads((tmp_path / folder / "tokenizer_config.json").read_text())
        said = {key: config[key] for key in ("add_prefix_space", "add_bos_token", "add_eos_token")}
        assert said == {"add_prefix_space": prefix, "add_bos_token": False, "add_eos_token": False}


def test_a_conversion_that_differs_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(spm, "_merges", lambda model: [])
    with pytest.raises(TokenizerError, match="cannot express this SentencePiece model: ids differ for"):
        load_tokenizer(model).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


INEXACT = [
    ("unigram", {}),
    ("bpe", {"normalization_rule_name": "nmt_nfkc"}),
    ("bpe", {"remove_extra_whitespaces": True}),
]


@pytest.mark.parametrize("kind, options", INEXACT)
def test_models_without_an_exact_form_encode_but_are_not_converted(train, tmp_path, kind, options):
    tokenizer = load_tokenizer(train(kind, **options))
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b" and tokenizer.fingerprint()
    with pytest.raises(TokenizerError, match="only BPE models that keep text as it is"):
        tokenizer.save(tmp_path / "out")


def test_a_converted_unigram_model_differs_from_sentencepiece_in_few_texts_and_in_none_of_its_pieces(
    train, text, tmp_path
):
    model = train("unigram")
    ours = spm.convert_unigram(model.read_bytes(), "name")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(model))
    lines = [line for line in text.splitlines() if line.strip()][:1000]
    different = 0
    for line, ids in zip(lines, ours.encode_batch(lines), strict=True):
        other = theirs.encode(line)
        different += ids != other
        assert ours.decode(ids) == line and len(ids) <= len(other) + 1
    assert different < 0.05 * len(lines)
    assert [ours.token_to_id(theirs.IdToPiece(index)) for index in range(500)] == list(range(500))
    with pytest.raises(TokenizerError, match="only unigram models that keep text as it is"):
        spm.convert_unigram(train("bpe").read_bytes(), "name")
    with pytest.raises(TokenizerError, match="only unigram models that keep text as it is"):
        model = train("unigram", normalization_rule_name="nmt_nfkc")
        spm.convert_unigram(model.read_bytes(), "name")
