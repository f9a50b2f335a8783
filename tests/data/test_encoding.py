import numpy as np
import pytest

from megalite.data.encoding import EncodingPlan, encode_texts
from megalite.data.error import DataError


class Letters:
    """a is 0, b is 1, ...; the end of text is 26."""

    vocab_size, eos_token_id = 27, 26

    def encode_batch(self, texts):
        return [[ord(letter) - ord("a") for letter in text] for text in texts]


def encode(texts, append_eod=False, vocab_size=27, names=("first", "second", "third")):
    letters = Letters()
    plan = EncodingPlan(letters, ("text",), append_eod, vocab_size, np.dtype("u2"), 99)
    return encode_texts(texts, letters, plan, names.__getitem__)


def test_the_end_of_text_closes_documents_that_have_tokens():
    tokens, lengths = encode(["ab", "", "c"], append_eod=True)
    assert tokens.tolist() == [0, 1, 26, 2, 26] and lengths.tolist() == [3, 0, 2]
    assert tokens.dtype == np.uint16
    tokens, lengths = encode(["ab", "", "c"])
    assert tokens.tolist() == [0, 1, 2] and lengths.tolist() == [2, 0, 1]


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_tokens_are_no_tokens(texts):
    tokens, lengths = encode(texts, append_eod=True)
    assert len(tokens) == 0 and lengths.tolist() == [0] * len(texts)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["ab", "z"], 25, "second: token id: expected 0 to 24, found 25"),
        (["ab", "", "xy"], 24, "third: token id: expected 0 to 23, found 24"),
        (["ab", "A"], 27, "second: token id: expected 0 to 26, found -32"),
        (["ab", "\U0001f600"], 200_000, "second: token id: expected 0 to 65535, found 128415"),
    ],
)
def test_an_id_outside_is_named_with_its_document(texts, vocab_size, message):
    for append_eod in (False, True) if vocab_size > 26 else (False,):
        with pytest.raises(DataError, match=message):
            encode(texts, append_eod, vocab_size)
