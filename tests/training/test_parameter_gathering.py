"""How often ZeRO-3 gathers a stage's parameters: once per step, or for each micro batch and direction; and
whether it does so before they are needed.
"""

from dataclasses import replace
from typing import NamedTuple

import pytest
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from megalite.parallel.shard import spec_of
from megalite.training.engine import initialize_communication
from tests.harness import run_distributed
from tests.trainers import ADAM, Case, build_trainer, micro_batches

NUM_STEPS = 3  # the first records the trace of parameter uses, later ones follow it
PREFETCHED_ELEMENTS = (
    1000  # one matrix of a layer or two: DeepSpeed's default is more than a whole stage here
)


class Counter:
    """Counts the elements that are gathered, by standing in front of each parameter's gather.

    elements: gathered so far. most_at_once: of the stage's elements, most that were there together. late:
    parameters that a module needed and nobody had begun to gather.
    """

    def __init__(self, engine):
        self.elements = self.most_at_once = self.late = 0
        self.parameters = list(engine.module.parameters())
        for parameter in self.parameters:
            parameter.all_gather_coalesced = self._counted(parameter.all_gather_coalesced)
        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        coordinator._fetch_sub_module_impl = self._watched(coordinator._fetch_sub_module_impl)

    def _watched(self, fetch):
        def watched(module, forward, is_leaf):
            statuses = [parameter.ds_status for parameter in module.parameters(recurse=False)]
            self.late += statuses.count(ZeroParamStatus.NOT_AVAILABLE)
            return fetch(module, forward, is_leaf)

        return watched

    def _counted(self, gather):
        def counted(parameters, *args, **kwargs):
            coming = sum(p.ds_numel for p in parameters)
            here = sum(p.ds_numel for p in self.parameters if p.ds_status is ZeroParamStatus.AVAILABLE)
            self.elements += coming
            self.most_at_once = max(self.most_at_once, here + coming)
            return gather(parameters, *args, **kwargs)

        return counted


WAYS = {"once": ("step", PREFETCHED_ELEMENTS), "always": ("micro_batch", 0)}
WAYS |= {"ahead": ("micro_batch", PREFETCHED_ELEMENTS)}


class Gathering(NamedTuple):
    """Of each step: elements gathered, as parts of the stage; parameters that came late; losses and norms.
    most_at_once, tables: as a part of the stage; tables are embedding and head, that backward does not read.
    """

    elements: list[float]
    late: list[int]
    numbers: list[tuple[float, float]]
    most_at_once: float
    tables: float


def gatherings(rank, case):
    """By way, and the number of micro batches."""
    initialize_communication()
    found = {}
    for way, (gathering, prefetched) in WAYS.items():
        options = {"stage3_prefetch_bucket_size": prefetched, "stage3_param_persistence_threshold": 0}
        trainer = build_trainer(rank, replace(case, gathering=gathering), **options)
        found[way] = gathering_of(trainer)
    return found, len(micro_batches(0, trainer.context))


def gathering_of(trainer):
    counter = Counter(trainer.engine)
    stage_elements = sum(p.ds_numel for p in trainer.engine.module.parameters())
    ratios, late, numbers = [], [], []
    for step in range(NUM_STEPS):
        counter.elements = counter.late = 0
        result = trainer.train_step(micro_batches(step, trainer.context), ADAM.learning_rate)
        ratios.append(counter.elements / stage_elements)
        late.append(counter.late)
        numbers.append((result.loss, result.grad_norm))
    tables = {
        p
        for p in trainer.engine.module.parameters()
        if "embed" in spec_of(p).name or "head" in spec_of(p).name
    }
    part = sum(p.ds_numel for p in tables) / stage_elements
    return Gathering(ratios, late, numbers, counter.most_at_once / stage_elements, part)


LAYOUTS = [{"pp": 2, "dp": 2}, {"pp": 4}]
SCHEDULES = [(name, layout) for name in ("1f1b", "afab", "zb-h1") for layout in LAYOUTS]


@pytest.mark.parametrize(
    ("schedule", "layout"), [*SCHEDULES, ("interleaved", LAYOUTS[0]), ("zbv", LAYOUTS[0])], ids=str
)
def test_gathering_once_a_step_or_for_each_micro_batch_gives_the_same_numbers(schedule, layout):
    """Weight gradients that were left for later gather nothing more: they need no weights."""
    for found, num_micro_batches in run_distributed(gatherings, 4, Case(**layout, schedule=schedule)):
        once, always, ahead = (found[way] for way in WAYS)
        assert once.numbers == always.numbers == ahead.numbers
        assert num_micro_batches > 1
        assert once.elements[-1] == 1
        assert always.elements[-1] == pytest.approx((2 - once.tables) * num_micro_batches)
        assert always.most_at_once < 0.6, "the stage did not shrink: parameters outstayed their module"
        # What is about to be used again is not let go of: the fewer layers, the more of them.
        assert 1 <= ahead.elements[-1] < always.elements[-1]
        # Gathered before they are needed, but for what the step begins with.
        assert min(always.late) > 50  # a control: without prefetching all are late
        assert once.late[0] > 50 and once.late[-1] == 0  # and so they are while there is no trace yet
        assert ahead.late[-1] <= 3
