"""Runs on GPUs, as a user starts them, beside the same runs on the CPU; skipped where torch sees no GPU.

The CPU's numbers are proven elsewhere, so they are the reference. NCCL has a GPU for each rank: on one GPU
the runs are of one rank, which still goes through NCCL, streams, FlexAttention and fp16's loss scale.

Tolerances of the losses, relative: 1e-4 in fp32 (sums in another order, over a few steps of Adam); in bf16
and fp16 as much as their last place is worth, 2 ** -8 and 2 ** -11, times four.
"""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.measure.timeline import read_timelines
from tests.launchers.conftest import prefix as prefix
from tests.launchers.jobs import Job, deepspeed, read_rows, untimed

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = pytest.mark.skipif(NUM_GPUS == 0, reason="torch sees no GPU")

STEPS = 6
TOLERANCE = {"fp32": 1e-4, "bf16": 4 * 2.0**-8, "fp16": 4 * 2.0**-11}
LAYOUTS = {  # by ranks
    1: [
        "",
        "data.mask_documents=true",
        "parallel.recompute=full",
        "parallel.parameter_gathering=micro_batch",
    ],
    2: [
        *("parallel.tp_size=2", "parallel.pp_size=2", ""),
        *(
            f"parallel.cp_size=2 parallel.context_attention={way} data.mask_documents=true"
            for way in ("gather", "ring", "heads")
        ),
    ],
    4: ["parallel.tp_size=2 parallel.pp_size=2"],
}
CASES = [(ranks, layout) for ranks, layouts in LAYOUTS.items() if ranks <= NUM_GPUS for layout in layouts]


def rows(
    folder: Path, prefix: str, name: str, accelerator: str, num_ranks: int, precision: str, *options: str
) -> list[dict[str, Any]]:
    """The metrics of a run of its own."""
    config: dict[str, Any] = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    path = folder / f"{precision}.json"
    path.write_text(json.dumps(config))
    arguments = ["--deepspeed_config", str(path), f"data.train={prefix}", f"output_dir={folder}/{name}"]
    arguments += [f"schedule.num_steps={STEPS}", "schedule.warmup_steps=2", "optimizer.learning_rate=1e-3"]
    with Job(deepspeed(num_ranks, *arguments, *options), folder, DS_ACCELERATOR=accelerator) as job:
        end = job.wait(300)
    assert (end.returncode, end.errors) == (0, []), end.stderr
    return read_rows(folder / name)


@pytest.mark.parametrize(("num_ranks", "layout"), CASES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_those_of_the_cpu(num_ranks, layout, precision, tmp_path, prefix):
    options = (*layout.split(), f"logging.timeline_at_step={STEPS - 1}")
    ours = rows(tmp_path, prefix, "gpu", "cuda", num_ranks, precision, *options)
    theirs = rows(tmp_path, prefix, "cpu", "cpu", 1, "fp32", *(w for w in layout.split() if "_size" not in w))
    assert [row["loss"] for row in ours] == pytest.approx(
        [row["loss"] for row in theirs], rel=TOLERANCE[precision]
    )
    for timeline in read_timelines(tmp_path / "gpu"):
        computed, [update] = timeline.lane("compute"), timeline.lane("update")
        assert len(computed) == 2 * timeline.facts["num_micro_batches"]
        assert all(a.end_seconds <= b.begin_seconds for a, b in pairwise([*computed, update]))
        assert all(span.seconds > 0 for span in computed)


def test_fp16_trains_and_its_loss_scale_goes_on_in_a_checkpoint(tmp_path, prefix):
    options = ("gpu", "cuda", 1, "fp16", f"checkpoint.save_every_steps={STEPS // 2}")
    whole = rows(tmp_path, prefix, *options)
    shutil.rmtree(tmp_path / "gpu" / "checkpoints" / f"step-{STEPS:08}")
    again = rows(tmp_path, prefix, *options)
    assert [untimed(row) for row in again] == [untimed(row) for row in whole]
    [theirs, *_] = rows(tmp_path, prefix, "cpu", "cpu", 1, "fp32")
    assert whole[0]["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE["fp16"])


def test_flashattention_over_documents_gives_flexattentions_losses(tmp_path, prefix):
    losses = []
    for name in ("varlen", "flex"):
        options = ("data.mask_documents=true", f"kernels.attention={name}")
        run = rows(tmp_path, prefix, name, "cuda", 1, "bf16", *options)
        losses.append([row["loss"] for row in run])
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE["bf16"])
