"""Files of conversations and pairs to batches: what is learnt, what is left out, what is kept on disk."""

import gzip
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.batch import IGNORED, Batch
from megalite.data.chat import open_chat
from megalite.data.chat_loader import ChatLoader
from megalite.data.chat_samples import ChatDatasets, SampleRow
from megalite.data.error import DataError
from megalite.data.fingerprint import check_same_data, describe_data
from megalite.data.packing import SampleOrder
from megalite.data.unpaired_loader import UnpairedLoader
from megalite.tokenizer.load import build_byte_tokenizer
from megalite.tokenizer.template import ChatTemplate, open_template

EOS, END = 256, "<|endoftext|>"
IN_ORDER = SampleOrder(seq_length=64, seed=1, packing=False, shuffle=False)
SHUFFLED = SampleOrder(seq_length=64, seed=1, packing=True, shuffle=True)
TOKENIZER = build_byte_tokenizer()
TEMPLATE = open_template(TOKENIZER, "plain")


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(kind, sources, folder, **changes):
    options = {"seq_length": 64, "cache_dir": folder / "cache", **changes}
    names = [sources] if isinstance(sources, str) else sources
    return open_chat(kind, names, TOKENIZER, options.pop("template", TEMPLATE), **options)


def texts(data):
    """Of each sequence its text, and what of it is learnt."""
    [source] = data.sources
    for index in range(len(source)):
        ids, is_learnt = source.sequence(index)
        yield TOKENIZER.decode(ids), TOKENIZER.decode(ids[is_learnt])


def loader_of(samples, batch=4, micro=2, rank=0, size=1, **options):
    return ChatLoader(
        samples, global_batch_samples=batch, num_micro_batches=micro, dp_rank=rank, dp_size=size,
        **{"vocab_size": 257, **options},
    )  # fmt: skip


def test_columns_are_read_as_trl_names_them(tmp_path):
    rows = [
        {"messages": talk("q", "a")},
        {"prompt": "p", "completion": " c"},
        {"prompt": [*talk("q", "old"), {"role": "user", "content": "r"}], "completion": talk("q", "new")[1:]},
        {"text": "all"},
        {"text": "ended<|endoftext|>"},
    ]
    assert list(texts(opened("conversations", write(tmp_path / "a.jsonl", rows), tmp_path))) == [
        ("User:\nq\nAssistant:\na<|endoftext|>\n", "a<|endoftext|>\n"),
        ("p c<|endoftext|>", " c<|endoftext|>"),
        (f"User:\nq\nAssistant:\nold{END}\nUser:\nr\nAssistant:\nnew{END}\n", f"new{END}\n"),
        ("all<|endoftext|>", "all<|endoftext|>"),
        ("ended<|endoftext|>", "ended<|endoftext|>"),
    ]  # fmt: skip


def test_pairs_are_two_sequences_whatever_their_columns_are(tmp_path):
    rows = [
        {"prompt": "p:", "chosen": "yes", "rejected": "no"},
        {"chosen": "so it is", "rejected": "so it was"},
        {"prompt": talk("q", "a")[:1], "chosen": talk("q", "a")[1:], "rejected": talk("q", "b")[1:]},
        {"prompt": "q", "chosen": talk("q", "a"), "rejected": talk("q", "b")},
    ]
    pairs = opened("pairs", write(tmp_path / "a.jsonl", rows), tmp_path)
    framed = [(f"User:\nq\nAssistant:\n{x}<|endoftext|>\n", f"{x}<|endoftext|>\n") for x in "ab"]
    assert len(pairs) == 4
    assert list(texts(pairs)) == [
        ("p:yes<|endoftext|>", "yes<|endoftext|>"),
        ("p:no<|endoftext|>", "no<|endoftext|>"),
        ("so it is<|endoftext|>", " is<|endoftext|>"),
        ("so it was<|endoftext|>", " was<|endoftext|>"),
        *framed,
        *framed,
    ]


BAD = [
    ({"messages": talk("q", "a")[:1]}, "no assistant turn"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role"),
    ({"messages": [{"role": "user"}]}, "a message without text"),
    ({"messages": "hi"}, "messages that is no list of messages"),
    ({"prompt": "p", "completion": "  "}, "empty completion"),
    ({"prompt": talk("q", "a"), "completion": []}, "empty completion"),
    ({"text": "x" * 64}, "more than 64 tokens"),
    ({"messages": talk("q", "a"), "tools": [{"name": "f"}]}, "tools, which are not supported"),
    ({"other": 1}, "no messages, prompt and completion, or text"),
    ("{broken\n", "not JSON"),
    ('{"text": "\\ud800"}\n', "not JSON"),
    ("[1]\n", "not a JSON object"),
]
BAD_PAIRS = [
    ({"prompt": "p", "chosen": "a", "rejected": "a"}, "equal chosen and rejected"),
    ({"prompt": "p", "chosen": "a", "rejected": ""}, "empty rejected"),
    ({"chosen": talk("q", "a"), "rejected": talk("r", "a")}, "no prompt and no common beginning"),
    ({"chosen": talk("q", "a"), "rejected": "q"}, "chosen and rejected of two kinds"),
    ({"prompt": "p", "chosen": "a"}, "no chosen and rejected"),
    ({"prompt": "p", "chosen": "a", "rejected": "b" * 63}, "more than 64 tokens"),
]


BAD_ANSWERS = [
    ({"prompt": "p", "completion": "c"}, "no prompt, completion and label"),
    ({"prompt": "p", "chosen": "c", "rejected": "d"}, "no prompt, completion and label"),
    ({"prompt": "p", "completion": "c", "label": 1}, "label that is neither true nor false"),
    ({"prompt": "p", "completion": "c", "label": None}, "no prompt, completion and label"),
    ({"prompt": "p", "completion": "c", "label": "true"}, "label that is neither true nor false"),
    ({"prompt": "p", "completion": "", "label": True}, "empty completion"),
    ({"prompt": "p", "completion": "c" * 63, "label": False}, "more than 64 tokens"),
]


@pytest.mark.parametrize("kind, bad, good", [
    ("conversations", BAD, {"text": "x" * 63}),
    ("pairs", BAD_PAIRS, {"prompt": "p", "chosen": "a", "rejected": "b" * 62}),
    ("unpaired", BAD_ANSWERS, {"prompt": "p", "completion": "c" * 62, "label": False}),
])  # fmt: skip
def test_records_that_cannot_be_used_are_counted_by_reason_with_the_first_of_each(tmp_path, kind, bad, good):
    path, said = tmp_path / "a.jsonl", []
    data = opened(kind, write(path, [good, "\n", *(row for row, _ in bad)]), tmp_path, report=said.append)
    assert len(data) == 1
    expected: dict[str, tuple[int, str]] = {}
    for line, (_, reason) in enumerate(bad, 3):  # a blank line is a line and no record
        count, where = expected.get(reason, (0, f"{path} line {line}"))
        expected[reason] = count + 1, where
    [source] = data.sources
    assert {one.reason: (one.count, one.where) for one in source.left_out} == expected
    assert source.num_records == 1 + len(bad)
    [line] = said
    assert f"left out {len(bad)} of {1 + len(bad)} records: " in line and "\n" not in line
    for reason, (count, where) in expected.items():
        assert f"{count} with {reason} (first: {where}" in line
    again = []
    opened(kind, str(path), tmp_path, report=again.append)  # found, and reported all the same
    assert again == said


def test_nothing_to_learn_from_is_refused_and_nothing_is_kept(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": ""}, {"other": 1}])
    with pytest.raises(
        DataError, match=r"nothing to learn from: 2 records, 1 with empty completion \(first: .* line 1\)"
    ):
        opened("conversations", path, tmp_path)
    assert not any((tmp_path / "cache").iterdir())
    with pytest.raises(DataError, match="nothing to learn from: no record"):
        opened("conversations", write(tmp_path / "b.jsonl", []), tmp_path)


def test_conversations_without_a_template_are_refused_with_their_place(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "x"}, {"messages": talk("q", "a")}])
    with pytest.raises(DataError, match=r"a.jsonl line 2: .*no chat template: .*data.chat_template"):
        opened("conversations", path, tmp_path, template=None)


def test_what_a_template_does_not_take_is_left_out(tmp_path):
    template = ChatTemplate(TOKENIZER, "{{ raise_exception('never') }}", "strict")
    path = write(tmp_path / "a.jsonl", [{"messages": talk("q", "a")}, {"text": "x"}])
    [source] = opened("conversations", path, tmp_path, template=template).sources
    assert "messages that chat template strict does not take (first: " in source.summary()


def test_every_kind_of_file_gives_the_same(tmp_path):
    rows = [{"messages": talk("q", "a"), "text": None}, {"messages": None, "text": "x"}]
    lines = "".join(json.dumps({k: v for k, v in row.items() if v}) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "folder").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "folder" / "train.parquet")
    names = ["a.jsonl", "b.jsonl.gz", "c.json", "d.parquet", "folder"]
    found = [list(texts(opened("conversations", str(tmp_path / name), tmp_path))) for name in names]
    assert found == [found[0]] * 5 and len(found[0]) == 2


@pytest.mark.parametrize("name, said", [
    ("missing.jsonl", "expected a file or a folder, found nothing"),
    ("a.txt", "expected JSON lines or Parquet, found .txt"),
    ("bad.parquet", "Parquet: expected to read it"),
    ("bad.json", "JSON: expected to read it"),
    ("hf:no-one/nothing-here", "dataset: expected to read it"),
])  # fmt: skip
def test_a_source_that_cannot_be_read_is_told_in_one_line(tmp_path, monkeypatch, name, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for file, content in {"a.txt": "x", "bad.parquet": "x", "bad.json": "[{]"}.items():
        (tmp_path / file).write_text(content)
    place = name if name.startswith("hf:") else str(tmp_path / name)
    with pytest.raises(DataError, match=said) as caught:
        opened("conversations", place, tmp_path)
    assert "\n" not in str(caught.value)


def test_prepared_data_is_found_again_and_only_where_nothing_changed(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"messages": talk("q", "a")}])
    first = opened("conversations", path, tmp_path)
    encoded = []
    encode = ChatTemplate.encode
    monkeypatch.setattr(ChatTemplate, "encode", lambda *args: encoded.append(1) or encode(*args))
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((tmp_path / "a.jsonl").read_bytes())
    again = opened("conversations", str(moved), tmp_path)
    assert not encoded and again.sources[0].sha256 == first.sources[0].sha256
    opened("conversations", str(moved), tmp_path, cache_dir=None)  # means `cache` beside the first source
    assert not encoded
    other = ChatTemplate(TOKENIZER, TEMPLATE.source + " ", "other")
    for number, change in enumerate([{"template": other}, {"seq_length": 65}, {}], 1):
        if not change:
            write(tmp_path / "a.jsonl", [{"messages": talk("q", "b")}])
        opened("conversations", path, tmp_path, **change)
        assert len(encoded) == number
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.mark.parametrize("file", ["tokens.bin", "learnt.bin", "tokens.idx", "manifest.json"])
def test_a_damaged_entry_is_made_again_with_a_warning(tmp_path, file):
    path = write(tmp_path / "a.jsonl", [{"messages": talk("q", "a")}])
    whole = list(texts(opened("conversations", path, tmp_path)))
    [entry] = (tmp_path / "cache").iterdir()
    content = bytearray((entry / file).read_bytes())
    content[len(content) // 2] ^= 1
    (entry / file).write_bytes(content)
    if file == "manifest.json":
        (entry / file).write_bytes(content[:10])
    with pytest.warns(UserWarning, match="expected an intact entry.*prepared again"):
        assert list(texts(opened("conversations", path, tmp_path))) == whole
    assert [one.name for one in (tmp_path / "cache").iterdir()] == [entry.name]


def opened_texts(path, folder):
    return list(texts(opened("conversations", path, folder)))


def test_several_may_prepare_at_once(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": talk("q", str(i))} for i in range(50)])
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as processes:
        futures = [processes.submit(opened_texts, path, tmp_path) for _ in range(4)]
        found = [future.result() for future in futures]
    assert found == [found[0]] * 4 and len(found[0]) == 50
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_row_holds_whole_sequences_and_labels_within_each():
    first = np.array([10, 11, 12, 13]), np.array([True, False, True, True])
    second = np.array([20, 21]), np.array([True, True])
    row = SampleRow.of([first, second], 8)
    no = IGNORED
    assert row.input_ids.tolist() == [10, 11, 12, 13, 20, 21, 0, 0]
    assert row.labels.tolist() == [no, 12, 13, no, 21, no, no, no]
    assert row.document_starts.tolist() == [0, 0, 0, 0, 4, 4, 6, 6]
    assert row.padding.tolist() == [False] * 6 + [True] * 2
    assert SampleRow.of([first], 4).labels.tolist() == [no, 12, 13, no]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    rows = [{"prompt": f"{i} ", "completion": "x" * (1 + i * 7 % 40)} for i in range(30)]
    return opened("conversations", write(folder / "many.jsonl", rows), folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"prompt": f"{i} ", "chosen": "yes" * (1 + i % 3), "rejected": "no"} for i in range(10)]
    return opened("pairs", write(folder / "pairs.jsonl", rows), folder)


def all_rows(batches):
    joined = [
        (row, label) for batch in batches for row, label in zip(batch.input_ids, batch.labels, strict=True)
    ]
    return [(tuple(row.tolist()), tuple(label.tolist())) for row, label in joined]


DIVISIONS = [(dp, micro) for dp in (1, 2, 3, 4) for micro in (1, 2, 3, 6) if 12 % (dp * micro) == 0]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("dp_size, num_micro_batches", DIVISIONS)
def test_slices_of_ranks_are_the_global_batch_whatever_the_micro_batch_is(
    many, packing, dp_size, num_micro_batches
):
    samples = many.samples(SHUFFLED._replace(packing=packing), 24)
    whole = all_rows(loader_of(samples, 12, 1).batch(12))
    seen = []
    for rank in range(dp_size):
        batches = loader_of(samples, 12, num_micro_batches, rank, dp_size).batch(12)
        assert [len(batch.input_ids) for batch in batches] == [
            12 // dp_size // num_micro_batches
        ] * num_micro_batches
        seen += all_rows(batches)
    assert seen == whole and len(set(seen)) == 12


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), packing=st.booleans())
def test_an_epoch_of_batches_holds_every_conversation_once_and_whole(many, seed, packing):
    order = SampleOrder(64, seed, packing, True)
    samples = many.samples(order, None)
    batch = [loader_of(samples, 1, 1).batch(i)[0] for i in range(len(samples))]
    found = []
    for one in batch:
        ids, starts, padding = one.input_ids[0], one.document_starts[0], one.padding[0]
        real = [start for start in starts.unique().tolist() if not padding[start]]
        found += [tuple(ids[(starts == start) & ~padding].tolist()) for start in real]
    [source] = many.sources
    assert sorted(found) == sorted(tuple(source.sequence(i)[0].tolist()) for i in range(len(source)))
    assert len(samples) < len(source) if packing else len(samples) == len(source)
    learnt = sum(int(source.sequence(i)[1][1:].sum()) for i in range(len(source)))
    assert sum(one.loss_count().item() for one in batch) == learnt


def test_a_stage_between_the_ends_has_documents_and_padding_only(many):
    samples = many.samples(SHUFFLED, 4)
    [batch] = loader_of(samples, 4, 1).batch(0)
    [middle] = loader_of(samples, 4, 1, reads_tokens=False).batch(0)
    assert middle.input_ids is None and middle.labels is None
    assert torch.equal(middle.document_starts, batch.document_starts) and torch.equal(
        middle.padding, batch.padding
    )


def test_an_id_outside_the_vocabulary_names_its_sample(many, pairs):
    for data in (many, pairs):
        loader = loader_of(data.samples(IN_ORDER, 8), 4, 1, vocab_size=EOS)
        with pytest.raises(DataError, match="sample 4: token id: expected 0 to 255, found 256"):
            loader.batch(4)


def test_rows_of_a_pair_stay_together_with_their_references(pairs):
    references = np.arange(20, dtype=np.float64).reshape(10, 2)
    samples = pairs.samples(SampleOrder(64, 3, False, True), 20)
    for dp_size, micro in ((1, 1), (1, 4), (2, 2), (4, 1)):
        seen = []
        for rank in range(dp_size):
            loader = loader_of(samples, 4, micro, rank, dp_size, references=references)
            for batch in loader.batch(8):
                assert batch.input_ids.shape == (2 * 4 // dp_size // micro, 64)
                assert batch.references.dtype == torch.float32
                seen += list(zip(batch.input_ids, batch.labels, batch.references, strict=True))
        assert len(seen) == 8
        items = [int(item) for position in range(8, 12) for item in samples.items(position)]
        for row, (ids, labels, reference) in enumerate(seen):
            item, side = items[row // 2], row % 2
            assert reference.item() == 2 * item + side
            said = "no" if side else "yes" * (1 + item % 3)
            assert TOKENIZER.decode(ids.tolist()).startswith(f"{item} {said}<|endoftext|>")
            assert labels[labels != IGNORED].tolist() == [*said.encode(), EOS]
    assert loader_of(samples).batch(0)[0].references is None


def test_pairs_are_not_parted_or_packed_and_references_must_fit(pairs, many):
    batch = Batch(input_ids=torch.zeros(6, 3), references=torch.zeros(6))
    assert [len(part.references) for part in batch.split(3)] == [2, 2, 2]
    with pytest.raises(ValueError, match="3 pairs do not divide into 2 parts"):
        batch.split(2)
    with pytest.raises(DataError, match=r"set data\.packing=false"):
        pairs.samples(SHUFFLED, 4)
    with pytest.raises(DataError, match=r"expected \[10, 2\] of pairs or answers, found \[9, 2\]"):
        loader_of(pairs.samples(IN_ORDER, 4), references=np.zeros((9, 2)))
    with pytest.raises(DataError, match="references"):
        loader_of(many.samples(IN_ORDER, 4), references=np.zeros((30, 1)))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Prompts of 2 to 4 tokens, answers of 5 to 3, so that some mixtures are too long; a third is bad."""
    folder = tmp_path_factory.mktemp("answers")
    rows = [
        {"prompt": f"{i}:" + "p" * (i % 3), "completion": chr(97 + i) * (4 - i % 3), "label": i % 3 > 0}
        for i in range(10)
    ]
    return opened("unpaired", write(folder / "answers.jsonl", rows), folder, seq_length=7)


def unpaired_loader_of(samples, batch=4, micro=2, rank=0, size=1, **options):
    return UnpairedLoader(
        samples, global_batch_samples=batch, num_micro_batches=micro, dp_rank=rank, dp_size=size,
        **{"vocab_size": 257, **options},
    )  # fmt: skip


@pytest.mark.parametrize("dp_size, micro", [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_a_mismatched_row_has_the_answer_of_the_sample_before_in_the_global_batch(answers, dp_size, micro):
    references = np.arange(40, dtype=np.float64).reshape(20, 2)
    samples = answers.samples(SampleOrder(7, 3, False, True), 20)
    seen = []
    for rank in range(dp_size):
        for batch in unpaired_loader_of(samples, 4, micro, rank, dp_size, references=references).batch(8):
            assert batch.input_ids.shape == batch.mismatched.input_ids.shape == (4 // dp_size // micro, 7)
            mixed = batch.mismatched
            seen += zip(
                batch.input_ids, batch.labels, batch.references, batch.desirable,
                mixed.input_ids, mixed.labels, mixed.references, strict=True,
            )  # fmt: skip
    items = [int(samples.items(position)[0]) for position in range(8, 12)]
    for place, (ids, labels, reference, desirable, *mixed) in enumerate(seen):
        item, other = items[place], items[place - 1]  # the first one's is the last
        prompt = f"{item}:" + "p" * (item % 3)
        own, theirs = ([*(chr(97 + i) * (4 - i % 3)).encode(), EOS] for i in (item, other))
        assert desirable.item() is (item % 3 > 0)
        for row, learnt, answer in ((ids, labels, own), (*mixed[:2], theirs)):
            whole = [*prompt.encode(), *answer][:7]
            assert row.tolist() == whole + [0] * (7 - len(whole))
            assert learnt[learnt != IGNORED].tolist() == whole[len(prompt) :]
            assert (learnt[: len(prompt) - 1] == IGNORED).all()
        assert (reference.item(), mixed[2].item()) == (2 * (8 + place), 2 * (8 + place) + 1)
    assert len(seen) == 4 and len(set(items)) == 4


def test_single_answers_are_not_packed_and_are_compared_with_others(answers):
    with pytest.raises(DataError, match=r"set data\.packing=false"):
        answers.samples(SHUFFLED, 4)
    samples = answers.samples(SampleOrder(7, 3, False, True), 20)
    with pytest.raises(DataError, match="20 samples are no whole batches of 6: keep the run's former"):
        unpaired_loader_of(samples, 6, 1)
    with pytest.raises(DataError, match="train_batch_size is 1: use 2 or more"):
        unpaired_loader_of(samples, 1, 1)
    with pytest.raises(DataError, match=r"expected \[20, 2\] of pairs or answers, found \[10, 2\]"):
        unpaired_loader_of(samples, references=np.zeros((10, 2)))
    [middle] = unpaired_loader_of(samples, 4, 1, reads_tokens=False).batch(0)
    assert middle.input_ids is None and middle.mismatched.labels is None
    assert middle.mismatched.padding.shape == (4, 7)
    [source] = answers.sources
    assert f"10 sequences, 70 tokens, {sum(5 - i % 3 for i in range(10))} learnt" in source.summary()


def test_once_gives_each_pair_in_order_and_fills_the_last_batch_from_the_beginning(pairs):
    samples = pairs.once(64, multiple_of=4)
    assert [int(samples.items(i)[0]) for i in range(len(samples))] == [*range(10), 0, 1]


def test_sources_are_mixed_by_weight_or_as_one(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(4)])
    b = write(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(8)])

    def first_letters(sources, order, count):
        samples = opened("conversations", sources, tmp_path).samples(order, count)
        return [chr(samples.rows(i)[0].input_ids[0]) for i in range(len(samples))]

    assert first_letters([a, b], IN_ORDER, None) == ["a"] * 4 + ["b"] * 8
    mixed = first_letters(["3", a, "1", b], IN_ORDER, 16)
    assert mixed.count("a") == 12 and mixed[:4].count("a") == 3
    shuffled = first_letters([a, b], IN_ORDER._replace(shuffle=True), 12)
    assert shuffled.count("a") == 4 and shuffled != sorted(shuffled)


def test_a_checkpoint_refuses_other_data_and_accepts_a_longer_run(tmp_path, many):
    def described(data, order=SHUFFLED, count=20):
        return json.loads(json.dumps(describe_data(ChatDatasets(data.samples(order, count)))))

    recorded = described(many)
    check_same_data(recorded, described(many, count=200), "the checkpoint")
    assert recorded["train"][0]["passes"] < described(many, count=200)["train"][0]["passes"]
    for other in (SHUFFLED._replace(seed=2), SHUFFLED._replace(packing=False)):
        with pytest.raises(
            DataError, match=r"not the data of the checkpoint: train dataset 1 of 1 .*many\.jsonl"
        ):
            check_same_data(recorded, described(many, other), "the checkpoint")
    rows = [
        {"prompt": f"{i} ", "completion": "y" * (1 + i * 7 % 40)} for i in range(30)
    ]  # of the same lengths
    changed = opened("conversations", write(tmp_path / "many.jsonl", rows), tmp_path)
    with pytest.raises(DataError, match="sha256: expected"):
        check_same_data(recorded, described(changed), "the checkpoint")
