"""How many bytes of text each token stands for."""

import numpy as np
from tokenizers import decoders

from megalite.tokenizer.tokenizer import Tokenizer


def count_text_bytes(tokenizer: Tokenizer, num_ids: int) -> np.ndarray | None:
    """Bytes of text by id, i64 [num_ids]; special tokens, and ids without a token, stand for none.

    num_ids: of the model; at least as many as the tokenizer has.

    None where it cannot be told. It can for byte-level tokenizers, GPT-2's kind: there each character of a
    token's name is one byte.
    """
    backend = tokenizer.to_backend()
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    counts = np.zeros(num_ids, np.int64)
    for name, token in backend.get_vocab(with_added_tokens=False).items():
        counts[token] = len(name)
    for token, added in backend.get_added_tokens_decoder().items():
        counts[token] = 0 if added.special else len(added.content.encode())
    return counts
