"""Token ids and labels of TRL's SFTTrainer and DPOTrainer for the same records, template and tokenizer."""

import json

import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megalite.batch import IGNORED
from megalite.data.chat import open_chat
from megalite.tokenizer.template import open_template
from megalite.tokenizer.tokenizer import HuggingFaceTokenizer
from tests.tokenizer.chat_tokenizer import build_chat_tokenizer

trl = pytest.importorskip("trl")

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who is there?"},
    {"role": "assistant", "content": "It is me.\n"},
    {"role": "user", "content": "Nobody?"},
]
SO, NOT_SO = ([{"role": "assistant", "content": text}] for text in ("So.", "Not so."))
CONVERSATIONS = {
    "messages": [{"messages": TALK[:3]}, {"messages": TALK + SO}],
    "dialogues": [{"prompt": TALK, "completion": SO}, {"prompt": TALK[:2], "completion": TALK[2:] + SO}],
    "texts": [
        {"prompt": "Who is", "completion": " there"},
        {"prompt": "So:", "completion": " me<|endoftext|>"},
    ],
    "text": [{"text": "Nobody is there"}, {"text": "me<|endoftext|>"}],
}
PAIRS = {
    "texts": [{"prompt": "Who is", "chosen": " there", "rejected": " me"}],
    "implicit texts": [{"chosen": "Who is there", "rejected": "Who is me"}],
    "dialogues": [{"prompt": TALK, "chosen": SO, "rejected": NOT_SO}],
    "implicit dialogues": [{"chosen": TALK + SO, "rejected": TALK + NOT_SO}],
}


@pytest.fixture(scope="module")
def tokenizer():
    """Without a begin of text, which we leave to templates, and TRL to the tokenizer."""
    backend = type(build_chat_tokenizer().to_backend()).from_str(build_chat_tokenizer().to_backend().to_str())
    backend.post_processor = None
    return HuggingFaceTokenizer(backend, "chat", "<|endoftext|>")


def trained_by_trl(tokenizer, trainer, config, rows, folder, **options):
    """The rows that a trainer of TRL has prepared."""
    template = open_template(tokenizer, "chatml").source
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": template}
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model, other = (LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.vocab_size, **size)) for _ in range(2))
    made = trainer(
        model=model,
        **({"ref_model": other} if trainer is trl.DPOTrainer else {}),
        args=config(str(folder), report_to=[], use_cpu=True, max_length=None, bf16=False, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer.to_backend(), **names),
    )
    return made.train_dataset


def ours(kind, tokenizer, rows, folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = open_template(tokenizer, "chatml")
    data = open_chat(kind, [str(path)], tokenizer, template, seq_length=200, cache_dir=folder / "cache")
    [source] = data.sources
    return [source.sequence(index) for index in range(len(source))]


@pytest.mark.parametrize("columns", CONVERSATIONS)
def test_conversations_have_the_ids_and_labels_of_trl(tokenizer, tmp_path, columns):
    rows = CONVERSATIONS[columns]
    assistant_only = columns in ("messages", "dialogues")
    theirs = trained_by_trl(
        tokenizer, trl.SFTTrainer, trl.SFTConfig, rows, tmp_path, assistant_only_loss=assistant_only
    )
    found = ours("conversations", tokenizer, rows, tmp_path)
    assert len(found) == len(theirs) == len(rows)
    for (ids, is_learnt), expected in zip(found, theirs, strict=True):
        assert ids.tolist() == expected["input_ids"]
        labels = [token if learnt else IGNORED for token, learnt in zip(ids.tolist(), is_learnt, strict=True)]
        assert labels == expected["labels"]
        assert is_learnt.any() and (columns == "text" or not is_learnt.all())


@pytest.mark.parametrize("columns", PAIRS)
def test_pairs_have_the_ids_and_completions_of_trl(tokenizer, tmp_path, columns):
    rows = PAIRS[columns]
    [theirs] = trained_by_trl(tokenizer, trl.DPOTrainer, trl.DPOConfig, rows, tmp_path)
    chosen, rejected = ours("pairs", tokenizer, rows, tmp_path)
    for (ids, is_learnt), answer in ((chosen, "chosen_ids"), (rejected, "rejected_ids")):
        assert ids.tolist() == theirs["prompt_ids"] + theirs[answer]
        assert ids[is_learnt].tolist() == theirs[answer]
