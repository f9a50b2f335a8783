"""The range of token ids: one check, one message."""

from collections.abc import Callable

import numpy as np

from megalite.data.error import DataError
from megalite.data.token_file import TokenFile

_IDS_AT_ONCE = 1 << 22  # so that memory stays flat


def check_ids(
    ids: np.ndarray | TokenFile,
    limit: int,
    where: str | Callable[[int], str],
    remedy: str = "wrong tokenizer or id type?",
) -> None:
    """Raise DataError at the first id of `ids` [n] that is not in [0, limit).

    where: how the message begins, or a function that gives this for the id's position in `ids`.
    """
    for start in range(0, len(ids), _IDS_AT_ONCE):
        some = ids[start : start + _IDS_AT_ONCE]
        if some.min() < 0 or some.max() >= limit:
            at = int(np.argmax((some < 0) | (some >= limit)))
            place = where(start + at) if callable(where) else where
            raise DataError(f"{place}: token id: expected 0 to {limit - 1}, found {int(some[at])}: {remedy}")
