import numpy as np
import pytest

from megalite.data import token_ids
from megalite.data.error import DataError
from megalite.data.token_ids import check_ids


@pytest.mark.parametrize("dtype", ["u1", "<u2", "<i4", "i8"])
@pytest.mark.parametrize("ids", [[], [0], [0, 6, 3]])
def test_ids_within_the_range_are_allowed(ids, dtype):
    check_ids(np.array(ids, dtype), 7, "here")


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_the_first_id_outside_is_named_with_its_place(at_once, monkeypatch):
    monkeypatch.setattr(token_ids, "_IDS_AT_ONCE", at_once)
    for ids, place, bad in (([1, 2, 7, 8], 2, 7), ([1, -1, 9], 1, -1), ([9], 0, 9), ([1, 1, 1, 7], 3, 7)):
        message = f"token {place}: token id: expected 0 to 6, found {bad}: wrong tokenizer or id type"
        with pytest.raises(DataError, match=message):
            check_ids(np.array(ids), 7, lambda at: f"token {at}")
        with pytest.raises(DataError, match=r"^here: token id: .*: try again$"):
            check_ids(np.array(ids), 7, "here", "try again")
