"""How often a step waits for a number of the device: never while micro batches pass, and a few times after.

On a GPU each such read holds the host up until all work that was given before is done. Here, without one,
reads are counted where torch dispatches them.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.training.engine import initialize_communication
from megalite.training.places import Place
from tests.harness import run_distributed
from tests.trainers import Case, build_trainer, micro_batches

READS = ("aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.nonzero.default")
CASES = [
    *(Case(zero=zero, uneven=True) for zero in (0, 1)),
    *(Case(zero=zero, precision="bf16", uneven=True) for zero in (2, 3)),
    Case(zero=3, gathering="micro_batch", tied=True, recompute="full"),
]
MOST_AFTER = 8  # of loss and norm, by us and by DeepSpeed, which asks several times whether they are numbers
WARM_UP = 3  # steps in which ZeRO-3 records what it will gather: see _own_the_trace


class Reads(TorchDispatchMode):
    """Counts, by the place that the step is in, what makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.counts = None, Counter()

    def mark(self, place) -> None:
        self.place = place

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if str(operation) in READS:
            self.counts[self.place] += 1
        return operation(*arguments, **options or {})


def reads_of(rank, cases) -> list[Counter]:
    initialize_communication()
    return [reads_of_case(rank, case) for case in cases]


def reads_of_case(rank, case) -> Counter:
    trainer = build_trainer(rank, case)
    batches = micro_batches(0, trainer.context, case)
    for _ in range(WARM_UP):
        trainer.train_step(batches, 1e-3)
    with Reads() as reads:
        trainer.train_step(batches, 1e-3, lambda loss, norm: None, reads.mark)
        counts = Counter(reads.counts)
        torch.ones(()).item()  # a control: it does count
    assert reads.counts[reads.place] == counts[reads.place] + 1
    return counts


def test_no_number_is_read_while_micro_batches_pass_and_few_after():
    [found] = run_distributed(reads_of, 1, CASES, timeout_seconds=300)
    for case, counts in zip(CASES, found, strict=True):
        assert counts[Place.PASSES] == 0, f"{case}: {counts}"
        assert 1 <= counts[Place.OPTIMIZER] <= MOST_AFTER, f"{case}: {counts}"
