"""A search finds what trying all would find, counts what it leaves out, and writes configs that run."""

import json

import pytest

from megalite.config.deepspeed import load_deepspeed
from megalite.config.load import load_run
from megalite.error import UserError
from megalite.plan.found import page_of_search, write_configs
from megalite.plan.job import Job, check_job
from megalite.plan.plan import make_plan
from megalite.plan.search import _grids, _ways, _with_grid, _with_ways, name_of, search_layouts
from tests.plan.test_run_plan import PLAIN, job_of

ROOMY = PLAIN.model_copy(update={"memory_gib": 4.0, "memory_gb_per_second": 10.0, "elementwise_bytes": 200.0})


def all_plans(job):
    """Every layout of the search's own list that exists, planned in full without any short cut."""
    for grid in _grids(job):
        for ways in _ways(job, grid):
            candidate = _with_ways(_with_grid(job, grid), ways)
            try:
                check_job(candidate)
            except UserError:
                continue
            yield make_plan(candidate)


def test_the_first_is_the_fastest_that_fits_of_all():
    job = job_of(per_node=2, device=ROOMY, batch=8)
    plans = [(plan.step.total, max(sum(rank.values()) for rank in plan.memory)) for plan in all_plans(job)]
    tight = 1.05 * min(most for _, most in plans)  # more than are planned in full are faster and do not fit
    device = ROOMY.model_copy(update={"memory_gib": tight / 2**30, "memory_reserve": 0.0})
    search = search_layouts(job_of(per_node=2, device=device, batch=8), num_best=3)
    best = min(seconds for seconds, most in plans if most <= tight)
    assert any(most > tight for _, most in plans)  # memory is what decides
    assert search.plans[0].fits
    assert search.plans[0].step.total <= 1.02 * best  # the first sieve is an estimate
    assert search.num_layouts == sum(search.ruled_out.values()) + len(search.plans)


def test_the_configs_that_are_written_are_read_again_as_what_was_planned(tmp_path):
    job = job_of(per_node=2, device=ROOMY)
    search = search_layouts(job, num_best=2)
    commands = write_configs(search, tmp_path / "plans")
    assert len(commands) == 2
    for plan, command in zip(search.plans, commands, strict=True):
        words = command.split()
        run = load_run(words[-1])
        deepspeed = load_deepspeed(words[words.index("--deepspeed_config") + 1], dp_size=run.dp_size_of(2))
        assert run == plan.job.run
        again = make_plan(Job(run, deepspeed, ROOMY, 1, 2))
        assert again.step == plan.step and again.memory == plan.memory
        assert name_of(again.job) == name_of(plan.job)


def test_the_page_counts_what_is_out_and_says_why():
    search = search_layouts(job_of(per_node=2, device=ROOMY), num_best=2)
    page = page_of_search(search)
    assert f"{search.num_layouts:,} layouts looked at, the best 2:" in page
    assert "train_batch_size does not divide" in page or "slower than these" in page
    assert all(f"{number:,}" in page for number in search.ruled_out.values())


def test_where_nothing_fits_one_line_says_so():
    tiny = PLAIN.model_copy(update={"memory_gib": 1e-5})
    with pytest.raises(UserError, match=r"none of [\d,]+ layouts runs on 2 x plain .*use more devices"):
        search_layouts(job_of(per_node=2, device=tiny))


def test_a_search_leaves_the_job_that_it_was_given_alone():
    job = job_of(per_node=2, device=ROOMY)
    before = json.dumps(job.deepspeed.raw)
    search_layouts(job, num_best=1)
    assert json.dumps(job.deepspeed.raw) == before


def test_a_search_cuts_evenly_where_the_job_that_it_was_given_does_not():
    """Stages of its sizes would be those of one grid alone."""
    uneven = search_layouts(
        job_of("pp_size=2", "layers_per_stage=[3,5]", per_node=2, device=ROOMY), num_best=1
    )
    even = search_layouts(job_of("pp_size=2", per_node=2, device=ROOMY), num_best=1)
    assert (uneven.ruled_out, uneven.num_layouts) == (even.ruled_out, even.num_layouts)
