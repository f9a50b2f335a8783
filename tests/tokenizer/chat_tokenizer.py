"""A small tokenizer with merges, the special tokens of chat templates, and a begin of text."""

from functools import cache

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megalite.tokenizer.tokenizer import HuggingFaceTokenizer, Tokenizer

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>",
]  # fmt: skip
TEXTS = [
    "Who is there? It is me. there there user assistant system",
    "Nobody is there, I'm ab ab ab\n\nSo. So.",
] * 4


@cache
def build_chat_tokenizer() -> Tokenizer:
    """The same one each time."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    begin = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    backend.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[begin])
    return HuggingFaceTokenizer(backend, "chat", "<|endoftext|>")
