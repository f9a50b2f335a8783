"""Whole runs of fine-tuning and of DPO give the numbers of TRL's trainers: what is logged, and the weights.

Both begin with the same Hugging Face folder and the same records; our side is a job from its configuration to
its last checkpoint, in several layouts, TRL's is one process. TRL is set to what we do: fp32, AdamW with the
decay of matrices alone, a constant rate, records in our order. What it does otherwise:
- its packing fills samples in another order, so that packed runs are compared with an epoch to a step;
- its DPO learns all that a template puts behind an answer, and ours what the template marks, so that the
  template here marks the line's end as well;
- its SFT loss is the mean over the labels of all micro batches of a step, as ours.

Tolerances: of logged numbers 1e-5, a hundred roundings of fp32, relative; and absolute, for rewards, which
are differences of sums of tens of nats. The update of each weight, last minus first, is the same within 1e-3
of its size: Adam divides each gradient by its own size, so that a rounding shows where that is near epsilon.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

import megalite
from megalite.config.checkpoint import CheckpointConfig
from megalite.config.data import DataConfig
from megalite.config.logging import LoggingConfig
from megalite.config.run import RunConfig
from megalite.config.schedule import ScheduleConfig
from megalite.config.tuning import PreferenceConfig
from megalite.data.chat import open_chat
from megalite.data.packing import SampleOrder
from megalite.tokenizer.load import load_tokenizer
from megalite.tokenizer.template import open_template
from megalite.training.engine import initialize_communication
from tests.conversations import (
    SEQ_LENGTH,
    TEMPLATE,
    chat_tokenizer,
    conversations,
    model_of,
    tokens_of,
    write_rows,
)
from tests.harness import run_distributed
from tests.jobs_in_world import run_job
from tests.reference import BETA1, BETA2, CLIP, EPSILON, LEARNING_RATE, WEIGHT_DECAY, transformers_model
from tests.trainers import BATCH, SEED, Case, deepspeed_config, run_config

trl = pytest.importorskip("trl")

NUM_STEPS = 3
BETA = 0.3
PACKED = 14  # records, which fill BATCH samples: a step is an epoch
KEYS = {
    "finetune": ["loss", "grad_norm"],
    "prefer": [
        *("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins"),
        *("rewards/accuracies", "logps/chosen", "logps/rejected"),
    ],
}


CLOSED = TEMPLATE.replace("{% endgeneration %}{{ '\n' }}", "{{ '\n' }}{% endgeneration %}")


def tokenizer() -> PreTrainedTokenizerFast:
    made = copy.deepcopy(chat_tokenizer())
    made.chat_template = CLOSED
    return made


@dataclass(frozen=True)
class Kind:
    """What is trained: a task, and whether records share samples."""

    task: str
    packing: bool = False

    @property
    def name(self) -> str:
        return f"{self.task}-{'packed' if self.packing else 'apart'}"


KINDS = [Kind("finetune"), Kind("finetune", packing=True), Kind("prefer")]
CASES = [
    Case(zero=0),
    Case(tp=2, zero=1),
    Case(dp=2, zero=3),
    Case(pp=2, zero=2),
    Case(cp=2, zero=2, way="ring"),
]
JOBS = [(kind, case) for kind in KINDS for case in CASES if case.pp == case.cp == 1 or kind.task == "prefer"]


def records(kind: Kind) -> list[dict[str, Any]]:
    if kind.task == "finetune":
        return [{"messages": talk} for talk in conversations()[: PACKED if kind.packing else None]]
    talks = [talk for talk in conversations() if talk[-1]["role"] == "assistant"]
    others = [*talks[1:], *talks[:1]]
    pairs = [(talk[:-1], talk[-1:], other[-1:]) for talk, other in zip(talks, others, strict=True)]
    return [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in pairs
        if chosen != rejected and len(tokens_of(prompt + rejected).ids) <= SEQ_LENGTH
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers with a tokenizer, and a file of records for each kind."""
    folder = tmp_path_factory.mktemp("trl")
    transformers_model(model_of(), SEED).save_pretrained(folder / "start")
    assert CLOSED != TEMPLATE
    tokenizer().save_pretrained(folder / "start")
    for kind in KINDS:
        write_rows(folder / f"{kind.name}.jsonl", records(kind))
    return folder


def run_of(kind: Kind, case: Case, folder: Path) -> RunConfig:
    return run_config(
        case,
        task=kind.task,
        seed=SEED + 1,  # whose weights are to be replaced by those of the start
        model=model_of(),
        data=DataConfig(
            train=[str(folder / f"{kind.name}.jsonl")],
            tokenizer=str(folder / "start"),
            seq_length=SEQ_LENGTH,
            packing=kind.packing,
            cache_dir=str(folder / "cache" / str(case)),
        ),
        schedule=ScheduleConfig(num_steps=NUM_STEPS, decay="constant", warmup_steps=0),
        checkpoint=CheckpointConfig(start_from=str(folder / "start"), save_every_steps=0),
        logging=LoggingConfig(tensorboard=False, progress_bar=False, peak_tflops_per_device=1.0),
        preference=PreferenceConfig(beta=BETA),
        output_dir=str(folder / kind.name / str(case)),
    )


def train(rank: int, jobs: Sequence[tuple[Kind, Case]], folder: Path) -> None:
    initialize_communication()
    for kind, case in jobs:
        run_job(rank, run_of(kind, case, folder), deepspeed_config(case))


@cache
def trained(world_size: int, folder: Path) -> None:
    """Leaves the runs of so many ranks in their folders."""
    jobs = [job for job in JOBS if job[1].world_size == world_size]
    run_distributed(train, world_size, jobs, folder, timeout_seconds=400)


def in_our_order(kind: Kind, folder: Path) -> list[dict[str, Any]]:
    """The records as they come in the steps of a run, NUM_STEPS BATCH of them where they come apart."""
    rows = records(kind)
    if kind.packing:
        return rows
    ours = load_tokenizer(folder / "start")
    chat = open_chat(
        "pairs" if kind.task == "prefer" else "conversations",
        [str(folder / f"{kind.name}.jsonl")],
        ours,
        open_template(ours),
        seq_length=SEQ_LENGTH,
        cache_dir=folder / "cache",
    )
    assert len(chat) == len(rows)
    samples = chat.samples(SampleOrder(SEQ_LENGTH, SEED + 1, False, True), NUM_STEPS * BATCH)
    return [rows[int(samples.items(position)[0])] for position in range(len(samples))]


@cache
def theirs(kind: Kind, folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """What TRL's trainer logged of each step, and its last weights."""
    options: dict[str, Any] = {"packing": True, "max_length": SEQ_LENGTH} if kind.packing else {}
    if kind.task == "finetune":
        trainer, config = trl.SFTTrainer, trl.SFTConfig
        options |= {"assistant_only_loss": True}
    else:
        trainer, config = trl.DPOTrainer, trl.DPOConfig
        options |= {"beta": BETA, "precompute_ref_log_probs": True}
    micro_batches = 1 if kind.packing else 2
    made = trainer(
        model=transformers_model(model_of(), SEED),
        args=config(
            output_dir=str(folder / "theirs"),
            learning_rate=LEARNING_RATE,
            adam_beta1=BETA1,
            adam_beta2=BETA2,
            adam_epsilon=EPSILON,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            max_steps=NUM_STEPS,
            per_device_train_batch_size=BATCH // micro_batches,
            gradient_accumulation_steps=micro_batches,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **{"max_length": None} | options,
        ),
        train_dataset=Dataset.from_list(in_our_order(kind, folder)),
        processing_class=tokenizer(),
    )
    assert len(made.train_dataset) == BATCH * (1 if kind.packing else NUM_STEPS)
    made.train()
    rows = [row for row in made.state.log_history if "loss" in row]
    return rows, {name: tensor.clone() for name, tensor in made.model.state_dict().items()}


def rows_of(run: RunConfig) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(run.output_dir, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("kind", "case"), JOBS, ids=lambda x: x.name if isinstance(x, Kind) else str(x))
def test_a_run_logs_the_numbers_of_trl_and_ends_with_its_weights(kind, case, folder):
    trained(case.world_size, folder)
    run = run_of(kind, case, folder)
    rows, (expected, weights) = rows_of(run), theirs(kind, folder)
    assert len(rows) == len(expected) == NUM_STEPS
    for key in KEYS[kind.task]:
        # Before the first update rewards are 0 but for roundings, whose signs accuracies would count.
        begin = 1 if key == "rewards/accuracies" else 0
        got, want = (torch.tensor([row[key] for row in side[begin:]]) for side in (rows, expected))
        torch.testing.assert_close(
            got, want, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    start = transformers_model(model_of(), SEED).state_dict()
    for name, tensor in megalite.load(run.output_dir).state_dict().items():
        update = weights[name] - start[name]
        relative = ((tensor - weights[name]).norm() / update.norm()).item()
        assert relative < 1e-3, f"{name}: its update is off by {relative:.1e}"
