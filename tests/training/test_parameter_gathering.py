"""How often ZeRO-3 gathers a stage's parameters: once a step, or for each micro batch and direction."""

import pytest

from megalite.training.engine import initialize_communication
from tests.harness import run_distributed
from tests.replicas import ADAM, Case, build_replica, micro_batches

NUM_STEPS = 3  # the first records the trace of parameter uses, later ones follow it


class Counter:
    """Counts the elements that are gathered, by standing in front of each parameter's gather."""

    def __init__(self, module):
        self.elements = 0
        for parameter in module.parameters():
            parameter.all_gather_coalesced = self._counted(parameter.all_gather_coalesced)

    def _counted(self, gather):
        def counted(parameters, *args, **kwargs):
            self.elements += sum(p.ds_numel for p in parameters)
            return gather(parameters, *args, **kwargs)

        return counted


def gathered_per_step(rank, case):
    """(elements gathered in each step / elements of the stage, losses)."""
    initialize_communication()
    replica = build_replica(rank, case, stage3_param_persistence_threshold=0)
    counter = Counter(replica.engine.module)
    stage_elements = sum(p.ds_numel for p in replica.engine.module.parameters())
    ratios, losses = [], []
    for step in range(NUM_STEPS):
        counter.elements = 0
        result = replica.train_step(micro_batches(step, replica.context), ADAM.learning_rate)
        ratios.append(counter.elements / stage_elements)
        losses.append((result.loss, result.grad_norm))
    return ratios, losses, len(micro_batches(0, replica.context))


@pytest.mark.parametrize("schedule", ["1f1b", "afab"])
@pytest.mark.parametrize("layout", [{"pp": 2, "dp": 2}, {"pp": 4}], ids=str)
def test_gathering_once_a_step_or_for_each_micro_batch_gives_the_same_numbers(schedule, layout):
    once, always = (
        run_distributed(gathered_per_step, 4, Case(**layout, schedule=schedule, gathering=gathering))
        for gathering in ("step", "micro_batch")
    )
    for stage_once, stage_always in zip(once, always, strict=True):
        assert stage_once[1] == stage_always[1]
        num_micro_batches = stage_once[2]
        assert num_micro_batches > 1
        assert stage_once[0][-1] == 1
        assert stage_always[0][-1] == 2 * num_micro_batches
