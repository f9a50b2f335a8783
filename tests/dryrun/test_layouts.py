"""Jobs of 16 ranks in many layouts come to the end of their step, and say what real ranks say."""

import inspect
from dataclasses import replace

import pytest
import torch.distributed as dist

from megalite.dryrun.groups import build_roster
from megalite.dryrun.log import Exchange, Log
from megalite.dryrun.verdict import dry_run
from megalite.dryrun.walk import walk
from megalite.parallel import mappings
from megalite.parallel.head import CHUNK_LOGITS
from megalite.training.engine import initialize_communication
from tests.dryrun.jobs import ALIGNED, job_of
from tests.harness import run_distributed
from tests.trainers import ADAM, Case, build_trainer, micro_batches

CASES = [
    Case(tp=2, pp=2, dp=2, cp=2),
    Case(tp=2, pp=4, dp=2, schedule="zb-h1", zero=2, tied=True),
    Case(pp=2, cp=2, dp=4, schedule="interleaved", way="ring", documents=True),
    Case(tp=2, pp=2, dp=2, cp=2, schedule="zbv", way="heads", zero=1, tied=True, recompute="selective"),
    Case(tp=2, pp=2, dp=4, ep=4, schedule="afab", model_kind="experts", precision="bf16", recompute="full"),
    Case(tp=4, pp=4, zero=0, sp=False, tied=True, gathering="micro_batch"),
    Case(tp=4, dp=4, gathering="micro_batch", precision="bf16"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layout_of_16_ranks_comes_to_its_end(case):
    job = job_of(case, num_micro_batches=2 if case.dp < 4 else 1)
    assert job.world_size == 16
    verdict = dry_run(job.run, job.deepspeed, 16, gpus_per_node=4)
    assert verdict.faults == []
    assert verdict.num_entries > 16 * 20
    assert all(walk.peak_bytes > walk.weight_bytes > 0 for walk in verdict.walks)


SPOKEN = ("all_reduce", "all_gather_single", "reduce_scatter_single", "all_to_all_single")
MODELLED = "megalite.training.engine"  # and DeepSpeed: what a walk does not meet
Said = tuple[str, tuple[int, ...], int]  # what, among whom, bytes


def said_by_a_real_rank(rank: int, case: Case) -> list[Said]:
    """What our own code has torch.distributed do in a training step, engine aside."""
    initialize_communication()
    said: list[Said] = []

    def say(name, group, tensor):
        members = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        said.append((name, members, tensor.nbytes))

    def spied(name, function):
        def call(*tensors, group=None, **options):
            caller = inspect.currentframe().f_back.f_globals["__name__"]
            if caller.startswith("megalite.") and caller != MODELLED:
                say(name, group, tensors[1] if name in SPOKEN[2:] else tensors[0])
            return function(*tensors, group=group, **options)

        return call

    def pass_all(operations, pass_all=dist.batch_isend_irecv):
        for operation in operations:
            say(operation.op.__name__, operation.group, operation.tensor)
        return pass_all(operations)

    case = replace(case, memory=False)  # as on a GPU, which is what a walk is of
    trainer = build_trainer(rank, case, model=ALIGNED if case.model_kind == "experts" else None)
    for chunk in trainer.engine.module:
        if chunk.lm_head is not None:
            chunk.lm_head.chunk_logits = CHUNK_LOGITS
    for name in SPOKEN:
        setattr(dist, name, spied(name, getattr(dist, name)))
    mappings._all_gather, mappings._reduce_scatter = dist.all_gather_single, dist.reduce_scatter_single
    mappings.SUMMED_WHOLE = set()
    dist.batch_isend_irecv = pass_all
    trainer.train_step(micro_batches(0, trainer.context, case), ADAM.learning_rate)
    return said


def said_in(log: Log, groups: dict) -> list[Said]:
    """The same of a log."""
    names = {"all_gather": "all_gather_single", "reduce_scatter": "reduce_scatter_single"}
    names |= {"all_to_all": "all_to_all_single", "send": "isend", "receive": "irecv"}
    said = []
    for entry in log:
        if isinstance(entry, Exchange):
            said += [(names[p.verb], groups[p.group], p.num_bytes) for p in entry.passages]
        elif not entry.is_modelled:
            said.append((names.get(entry.kind, entry.kind), groups[entry.group], entry.num_bytes))
    return said


REAL_CASES = [
    Case(tp=2, pp=2, tied=True, zero=1, schedule="zbv"),
    Case(pp=2, cp=2, way="ring"),
    Case(tp=2, dp=2, ep=2, model_kind="experts", recompute="full", precision="bf16"),
    Case(tp=2, dp=2, row_chunks=3),
]


@pytest.mark.parametrize("case", REAL_CASES, ids=str)
def test_a_walk_says_what_the_rank_of_a_real_job_says(case):
    """Its own code's words in their order; how many rows go to which expert is not known to a walk."""
    real = run_distributed(said_by_a_real_rank, 4, case)
    job = job_of(case)
    roster = build_roster(job.run, 4)
    for rank in (0, 3):
        walked = said_in(walk(job.run, job.deepspeed, rank, 4).log, roster.groups[rank])
        assert len(walked) > 20
        assert list(map(without_rows, walked)) == list(map(without_rows, real[rank]))


def without_rows(said: Said) -> Said:
    name, members, num_bytes = said
    return name, members, 0 if name == "all_to_all_single" else num_bytes
