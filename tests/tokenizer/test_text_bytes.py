"""How many bytes of text each token stands for."""

import argparse
import inspect

import pytest

from megalite.tokenizer.text_bytes import count_text_bytes
from megalite.tokenizer.train import train_tokenizer

TEXT = "né and né, ∞ and more\n" * 20


@pytest.mark.parametrize("kind", ["byte-bpe", "lillm"])
def test_the_bytes_of_ids_sum_to_the_bytes_of_the_text(tmp_path, kind):
    tokenizer = train_tokenizer(kind, [TEXT], 290, tmp_path)
    counts = count_text_bytes(tokenizer, tokenizer.vocab_size + 10)
    ids = tokenizer.encode(TEXT)
    assert len(ids) < len(TEXT.encode())
    assert counts[ids].sum() == len(TEXT.encode())
    assert counts[tokenizer.eos_token_id] == 0
    assert len(counts) == tokenizer.vocab_size + 10 and not counts[-10:].any()


def test_a_tokenizer_of_another_kind_does_not_tell(tmp_path):
    tokenizer = train_tokenizer("sentencepiece-bpe", [inspect.getsource(argparse)], 400, tmp_path)
    assert count_text_bytes(tokenizer, 400) is None
