import json
import shutil

import pytest

from megalite.data import corpus
from megalite.data.error import DataError
from megalite.data.indexed_dataset import IndexedDataset
from megalite.tokenizer.load import build_byte_tokenizer

LIMIT = 60_000


def test_the_corpus_is_the_same_each_time_and_leaves_packages_and_tests_out():
    first, second = list(corpus.read_corpus(max_bytes=300_000)), list(corpus.read_corpus(max_bytes=300_000))
    names = [name for name, _ in first]
    assert first == second and names == sorted(names) and len(names) > 5
    assert not any(set(name.split("/")) & corpus.SKIPPED_FOLDERS for name in names)
    assert 0 < sum(len(text.encode()) for _, text in first) <= 300_000


def test_files_that_are_not_utf8_are_left_out(tmp_path):
    (tmp_path / "tests").mkdir()
    for name, content in (("b.py", b"\xff"), ("a.py", b"a"), ("tests/c.py", b"c"), ("d.txt", b"d")):
        (tmp_path / name).write_bytes(content)
    assert list(corpus.read_corpus(tmp_path)) == [("a.py", "a")]


def test_json_lines_hold_one_document_per_file(tmp_path):
    count = corpus.write_jsonl(tmp_path / "new" / "x.jsonl", LIMIT)
    records = [json.loads(line) for line in (tmp_path / "new" / "x.jsonl").read_text().splitlines()]
    assert [(r["path"], r["text"]) for r in records] == list(corpus.read_corpus(max_bytes=LIMIT))
    assert len(records) == count and len(list((tmp_path / "new").iterdir())) == 1


def test_default_data_is_the_corpus_in_bytes(tmp_path):
    dataset = IndexedDataset(corpus.prepare_default_data(tmp_path, build_byte_tokenizer(), LIMIT))
    texts = [text for _, text in corpus.read_corpus(max_bytes=LIMIT) if text]
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[*text.encode(), 256] for text in texts]


def test_default_data_is_used_again_only_when_it_is_complete_and_the_same(tmp_path, monkeypatch):
    tokenizer = build_byte_tokenizer()
    prefix = corpus.prepare_default_data(tmp_path, tokenizer, LIMIT)
    made = []
    monkeypatch.setattr(
        corpus, "read_corpus", lambda max_bytes: made.append(max_bytes) or iter([("a.py", "ab")])
    )
    corpus.prepare_default_data(tmp_path, tokenizer, LIMIT)
    assert made == []
    with open(f"{prefix}.bin", "ab") as file:
        file.write(b"\0\0")
    corpus.prepare_default_data(tmp_path, tokenizer, LIMIT)
    corpus.prepare_default_data(tmp_path, tokenizer, LIMIT - 1)
    assert made == [LIMIT, LIMIT - 1]
    assert IndexedDataset(prefix).tokens.tolist() == [97, 98, 256]


def test_a_machine_without_sources_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "read_corpus", lambda max_bytes: iter([]))
    with pytest.raises(DataError, match=r"expected Python source files, found none: name data\.train"):
        corpus.prepare_default_data(tmp_path / "d", build_byte_tokenizer())
    assert list((tmp_path / "d").iterdir()) == []
    shutil.rmtree(tmp_path / "d")
