"""How often ZeRO-3 gathers a stage's parameters: once per step, or for each micro batch and direction."""

import pytest
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from megalite.training.engine import initialize_communication
from tests.harness import run_distributed
from tests.trainers import ADAM, Case, build_trainer, micro_batches

NUM_STEPS = 3  # the first records the trace of parameter uses, later ones follow it


class Counter:
    """Counts the elements that are gathered, by standing in front of each parameter's gather.

    elements: gathered so far. most_at_once: of the stage's elements, most that were there together.
    """

    def __init__(self, module):
        self.elements = self.most_at_once = 0
        self.parameters = list(module.parameters())
        for parameter in self.parameters:
            parameter.all_gather_coalesced = self._counted(parameter.all_gather_coalesced)

    def _counted(self, gather):
        def counted(parameters, *args, **kwargs):
            coming = sum(p.ds_numel for p in parameters)
            here = sum(p.ds_numel for p in self.parameters if p.ds_status is ZeroParamStatus.AVAILABLE)
            self.elements += coming
            self.most_at_once = max(self.most_at_once, here + coming)
            return gather(parameters, *args, **kwargs)

        return counted


def gathered_per_step(rank, case):
    """Elements gathered in each step, and most at once, as parts of the stage; losses; micro batches."""
    initialize_communication()
    trainer = build_trainer(rank, case, stage3_param_persistence_threshold=0)
    counter = Counter(trainer.engine.module)
    stage_elements = sum(p.ds_numel for p in trainer.engine.module.parameters())
    ratios, losses = [], []
    for step in range(NUM_STEPS):
        counter.elements = 0
        result = trainer.train_step(micro_batches(step, trainer.context), ADAM.learning_rate)
        ratios.append(counter.elements / stage_elements)
        losses.append((result.loss, result.grad_norm))
    num_micro_batches = len(micro_batches(0, trainer.context))
    return ratios, counter.most_at_once / stage_elements, losses, num_micro_batches


@pytest.mark.parametrize("schedule", ["1f1b", "afab"])
@pytest.mark.parametrize("layout", [{"pp": 2, "dp": 2}, {"pp": 4}], ids=str)
def test_gathering_once_a_step_or_for_each_micro_batch_gives_the_same_numbers(schedule, layout):
    once, always = (
        run_distributed(gathered_per_step, 4, Case(**layout, schedule=schedule, gathering=gathering))
        for gathering in ("step", "micro_batch")
    )
    for stage_once, stage_always in zip(once, always, strict=True):
        gathered_once, _, losses_once, num_micro_batches = stage_once
        gathered_always, most_at_once, losses_always, _ = stage_always
        assert losses_once == losses_always
        assert num_micro_batches > 1
        assert gathered_once[-1] == 1
        assert gathered_always[-1] == 2 * num_micro_batches
        assert most_at_once < 0.6, "the stage did not shrink: parameters outstayed their module"
