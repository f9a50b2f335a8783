"""A file of conversations, and of each its tokens by transformers alone: what a reference trains on.

Answers have 1 to 16 words and questions up to 20, unlike from one to the next, so that samples and micro
batches differ in how much there is to learn.
"""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from megalite.config.model import ModelConfig
from tests.tokenizer.chat_tokenizer import build_chat_tokenizer
from tests.trainers import MODELS

Messages = list[dict[str, str]]
SEQ_LENGTH = 64
WORDS = ["Who", "is", "there", "It", "me", "user", "assistant", "system", "Nobody", "So", "ab", "I'm"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOO_LONG = {"messages": [{"role": "assistant", "content": "Who " * SEQ_LENGTH}]}
UNANSWERED = {"messages": [{"role": "user", "content": "Who"}]}


class Tokens(NamedTuple):
    """Of a conversation: ids i64 [s] and whether each is learnt, bool [s]."""

    ids: torch.Tensor
    is_learnt: torch.Tensor


@cache
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """transformers' tokenizer with a chat template of its own."""
    backend = build_chat_tokenizer().to_backend()
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def model_of(kind: str = "dense", tied: bool = False) -> ModelConfig:
    """One of the models of tests/trainers.py, with the tokenizer's vocabulary."""
    changes = {"vocab_size": len(chat_tokenizer()), "tie_word_embeddings": tied}
    return MODELS[kind].model_copy(update=changes)


@cache
def conversations() -> list[Messages]:
    """40 of them; some have a system message, several turns, or end with a question."""
    chance = random.Random(5)

    def said(role: str, most: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(chance.choices(WORDS, k=chance.randint(1, most)))}

    made = []
    for number in range(40):
        question, answer = ((20, 1), (2, 16), (4, 4), (1, 8))[number % 4]
        messages = [said("system", 3)] if number % 5 == 0 else []
        for _ in range(1 + number % 3 // 2):
            messages += [said("user", question), said("assistant", answer)]
        made.append(messages + ([said("user", 3)] if number % 7 == 0 else []))
    return made


def tokens_of(messages: Messages) -> Tokens:
    """By transformers' tokenizer, template and assistant mask."""
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = chat_tokenizer().apply_chat_template(messages, **options)
    return Tokens(torch.tensor(found["input_ids"]), torch.tensor(found["assistant_masks"]) == 1)


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_conversations(folder: Path) -> list[str]:
    """Two files, with records between that cannot be used, and the tokenizer beside them."""
    rows: list[Any] = [{"messages": messages} for messages in conversations()]
    rows.insert(3, TOO_LONG)
    rows.insert(30, UNANSWERED)
    chat_tokenizer().save_pretrained(folder / "tokenizer")
    return [
        write_rows(folder / "one.jsonl", rows[:17]),
        write_rows(folder / "two.jsonl", rows[17:]),
    ]
