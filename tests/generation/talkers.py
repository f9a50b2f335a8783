"""Tiny random models that talk, and what transformers says in their place.

Their replies are nonsense that ends: the token that ends a turn is likelier than others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalite.config.run import RunConfig
from tests.checkpoint.llamas import random_llama, save_llama, tiny_run
from tests.tokenizer.chat_tokenizer import build_chat_tokenizer

CONTEXT_TOKENS, MAX_NEW_TOKENS = 256, 24
MESSAGES = ["Who is there?", " ab I'm\u00e9", "So.", "user assistant"]
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "plain": "<|endoftext|>"}  # of a turn, by hand


@dataclass(frozen=True)
class Talker:
    """A run that was tuned on conversations, and its model of transformers."""

    folder: Path
    run: RunConfig
    llama: Any

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def talking_run(folder: Path, template: str | None, variant: str = "plain") -> RunConfig:
    """Of a model with the vocabulary and the tokenizer of conversations, which is saved in the folder."""
    build_chat_tokenizer().save(folder / "tokenizer")
    data = {"train": ["chats.jsonl"], "tokenizer": str(folder / "tokenizer"), "chat_template": template}
    run = tiny_run(variant, **data)
    sizes = {
        "vocab_size": build_chat_tokenizer().vocab_size,
        "max_position_embeddings": CONTEXT_TOKENS,
        "eos_token_id": build_chat_tokenizer().eos_token_id,
    }
    return run.model_copy(update={"model": run.model.model_copy(update=sizes)})


def save_talker(
    folder: Path, template: str | None = "chatml", variant: str = "plain", end: str = "chatml"
) -> Talker:
    """folder/checkpoints and folder/tokenizer; its turns tend to end as those of a shipped template do."""
    run = talking_run(folder, template, variant)
    llama = random_llama(run.model)
    with torch.no_grad():
        llama.lm_head.weight[build_chat_tokenizer().token_to_id(ENDS[end])] *= 2
    save_llama(folder / "checkpoints", llama, run)
    return Talker(folder, run, llama)


@dataclass
class Said:
    """A conversation by transformers alone: tokens of each prompt and reply, and the replies' texts."""

    prompts: list[list[int]]
    tokens: list[list[int]]
    replies: list[str]

    @property
    def num_ended(self) -> int:
        """How many replies ended by themselves."""
        return sum(len(tokens) < MAX_NEW_TOKENS for tokens in self.tokens)


def talk_to_transformers(
    exported: Path, end: str, messages: Sequence[str] = MESSAGES, system: str | None = None
) -> Said:
    """What the model of a Hugging Face folder answers, in the template of its tokenizer, greedily.

    end: the token behind a turn; it is not part of a reply, nor is the end of text.
    """
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (end, "<|endoftext|>")]
    history = [] if system is None else [{"role": "system", "content": system}]
    said = Said([], [], [])
    for message in messages:
        history.append({"role": "user", "content": message})
        framed = tokenizer.apply_chat_template(
            history, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        prompt = framed["input_ids"]
        options = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS, "eos_token_id": ends}
        new = model.generate(**framed, pad_token_id=0, **options)[0, prompt.size(1) :].tolist()
        said.prompts.append(prompt[0].tolist())
        said.tokens.append([token for token in new if token not in ends])
        said.replies.append(tokenizer.decode(said.tokens[-1]))
        history.append({"role": "assistant", "content": said.replies[-1]})
    return said
