import json

import pytest

from tools import write_prose

SENTENCE = "Return the names of all files in the folder, sorted, without those that are hidden."


@pytest.mark.parametrize(
    ("text", "paragraphs"),
    [
        (SENTENCE, [SENTENCE]),
        (f"  {SENTENCE}\n\n{SENTENCE}", [SENTENCE, SENTENCE]),
        (SENTENCE.replace(" all ", "\n        all "), [SENTENCE]),
        (SENTENCE.replace("folder", ":class:`folder`"), [SENTENCE]),
        (SENTENCE.replace("files", "``files``").replace("sorted", "*sorted*"), [SENTENCE]),
        (SENTENCE.lower(), []),
        (SENTENCE[:-1], []),
        ("Return the names.", []),
        (SENTENCE.replace("names", "names[0]"), []),
        (SENTENCE.replace("all files", "x1 y2 z3 Files"), []),
        ("", []),
    ],
)
def test_what_reads_as_english_is_kept_on_one_line_without_markup(text, paragraphs):
    assert list(write_prose.find_paragraphs(text)) == paragraphs


def test_a_paragraph_is_kept_once(monkeypatch):
    other = SENTENCE.replace("files", "links")
    texts = [("a", f"{SENTENCE}\n\n{SENTENCE}"), ("b", SENTENCE), ("c", f"{other}\n\n{SENTENCE}\n\nshort")]
    monkeypatch.setattr(write_prose, "read_texts", lambda: iter(texts))
    assert list(write_prose.read_prose()) == [("a", SENTENCE), ("c", other)]


def test_sources_are_sorted_and_packages_and_tests_left_out(tmp_path):
    for name in ("b/z.py", "b/a.py", "a.py", "b/notes.txt", "tests/c.py", "site-packages/d.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    found = [path.relative_to(tmp_path).as_posix() for path in write_prose.find_sources(tmp_path)]
    assert found == ["a.py", "b/a.py", "b/z.py"]


def test_documents_are_the_same_each_time_and_no_more_than_asked(tmp_path, capsys):
    contents = []
    for name in ("first.jsonl", "new/second.jsonl"):
        assert write_prose.main(["--output", str(tmp_path / name), "--max-bytes", "200000"]) == 0
        contents.append((tmp_path / name).read_text())
    assert contents[0] == contents[1]
    texts = [json.loads(line)["text"] for line in contents[0].splitlines()]
    assert 190_000 < sum(len(text.encode()) for text in texts) <= 200_000
    assert all(write_prose.is_prose(line) for text in texts for line in text.split("\n\n"))
    assert f"{len(texts):,} documents" in capsys.readouterr().out


def test_too_small_a_limit_is_told_in_one_line(tmp_path, capsys):
    assert write_prose.main(["--output", str(tmp_path / "x.jsonl"), "--max-bytes", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("at most 1 bytes found here: raise --max-bytes")
    assert list(tmp_path.iterdir()) == []
