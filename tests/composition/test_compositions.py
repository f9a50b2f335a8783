"""Many features at once, and all that may happen between two steps: the numbers of one process all the same.

Tolerances are those of tests/test_equivalence.py and of its bf16: 1e-5 relative at the first step, a hundred
roundings of fp32, ten times as much at the last; of a run in bf16 or fp16 1 % of losses and 5 % of norms.
In fp8 a number that lies between two of 8 bits falls to either side, and the next steps are others: weights
of one process that are off by 1e-7 move a first loss by up to 2e-5 and its norm by 5e-3, later ones by 4e-3
and 3e-2. Allowed are 1e-4 and 2e-2, later 2e-2 and 1e-1.
Logits are compared with the largest: weights whose gradient is near nothing Adam moves either way, by a part
of the rate, so that 1e-4 is allowed. A step that was taken, lost or taken twice moves them by 1e-2.
"""

from functools import cache

import pytest
import torch

from tests.composition.cases import COMPOSITIONS
from tests.composition.compositions import (
    LIMIT,
    WORLD_SIZE,
    ChatBatches,
    Composition,
    chat_batches,
    save_bases,
)
from tests.composition.reference import Expected, Plain
from tests.composition.world import NUM_STEPS, SAVED, Told, run_all
from tests.harness import run_distributed
from tests.reference import assert_same_numbers
from tests.trainers import Case

LOW = (0.01, 0.05)  # of losses and of norms, in bf16 and fp16
FP8_FIRST, FP8_LATER = (1e-4, 0.02), (0.02, 0.1)


@cache
def told_of_world(root) -> tuple[ChatBatches, list[list[Told]] | AssertionError]:
    """By composition, what each rank told; ranks are started once."""
    (root / "chats").mkdir()
    chats = chat_batches(root / "chats", NUM_STEPS)
    save_bases(root / "start", COMPOSITIONS)
    try:
        by_rank = run_distributed(run_all, WORLD_SIZE, COMPOSITIONS, chats, root, timeout_seconds=1200)
    except AssertionError as error:
        return chats, error
    return chats, [[told[i] for told in by_rank] for i in range(len(COMPOSITIONS))]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("compositions")


def begun_and_gone_on(values: list[float]) -> list[float]:
    """As a run tells them: the step that the save is written beside is taken twice."""
    return values[: SAVED + 1] + values[SAVED:]


def assert_near(name: str, got: list[float], want: list[float], bound: float) -> None:
    """Relative."""
    worst = max(abs(a / b - 1) for a, b in zip(got, want, strict=True))
    assert worst < bound, f"{name} is off by {worst:.1e}"


def assert_same(told: Told, want: Expected, case: Case) -> None:
    losses, norms = begun_and_gone_on(want.losses), begun_and_gone_on(want.norms)
    is_exact = case.precision == "fp32" and case.fp8 == "none"
    if not is_exact:
        loss, norm = LOW if case.precision != "fp32" else FP8_LATER
        assert_near("loss", [*told.losses, told.validation], [*losses, want.validation], loss)
        assert_near("norm", told.norms, norms, norm)
        if case.precision == "fp32":
            assert_near("first loss", told.losses[:1], losses[:1], FP8_FIRST[0])
            assert_near("first norm", told.norms[:1], norms[:1], FP8_FIRST[1])
    else:
        assert_same_numbers("loss", told.losses, losses)
        assert_same_numbers("norm", told.norms, norms)
        assert_near("validation", [told.validation], [want.validation], 1e-5)
    if told.logits is not None and is_exact:
        assert want.logits is not None
        off = (told.logits - want.logits).abs().max() / want.logits.abs().max()
        assert off < 1e-4, f"logits are off by {off:.1e} of the largest"


@pytest.mark.timeout(1200)  # the first one waits for all
@pytest.mark.parametrize("composition", COMPOSITIONS, ids=str)
def test_what_meets_gives_the_numbers_of_one_process(composition: Composition, root):
    chats, found = told_of_world(root)
    if isinstance(found, AssertionError):
        raise found
    want = Plain(composition, chats).train()
    assert min(want.norms) > LIMIT
    first, *others = found[COMPOSITIONS.index(composition)]
    assert first.logits is not None and all(told.logits is None for told in others)
    for told in (first, *others):
        assert told.verdicts == ["skipped"] and told.resumed_from == [0, SAVED]
        assert_same(told, want, composition.before)


def test_a_search_for_a_loss_scale_goes_on_in_another_layout(root):
    """Each fp16 run had one step that overflowed, the spoilt one: so the scale is another than at first."""
    _, found = told_of_world(root)
    assert not isinstance(found, AssertionError)
    scales = [
        told.loss_scales
        for composition, ranks in zip(COMPOSITIONS, found, strict=True)
        for told in ranks
        if composition.before.precision == "fp16"
    ]
    assert len(scales) >= WORLD_SIZE
    for at_first, saved, resumed in scales:
        assert saved == resumed != at_first


@pytest.mark.parametrize("quantity", ["losses", "norms", "validation", "logits"])
def test_control_a_small_difference_is_noticed(quantity):
    want = Expected([4.0, 3.0, 2.0], [1.0, 1.0, 1.0], 3.0, torch.ones(1))
    told = Told(begun_and_gone_on(want.losses), begun_and_gone_on(want.norms), 3.0, [], torch.ones(1))
    assert_same(told, want, Case())
    value = getattr(told, quantity)
    changed = [*value[:-1], value[-1] * 1.001] if isinstance(value, list) else value * 1.001
    setattr(told, quantity, changed)
    with pytest.raises(AssertionError, match=r"off by|step 3"):
        assert_same(told, want, Case())
