"""Runs in which many features meet at once: a layout that begins them, one that goes on, and all the rest.

Both layouts are of four ranks. What follows from the data alone, labels that do not count, weights, padding
and documents, lies so that each rank and micro batch has another share of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megalite.batch import IGNORED, Batch
from megalite.config.data import DataConfig
from megalite.config.deepspeed import DeepSpeedConfig
from megalite.config.model import ModelConfig
from megalite.config.optimizer import OptimizerConfig
from megalite.config.run import RunConfig
from megalite.config.tuning import LoraConfig, PreferenceConfig
from megalite.data.chat import open_chat
from megalite.data.chat_loader import ChatLoader
from megalite.data.packing import SampleOrder
from megalite.parallel.context import Ranks
from megalite.tokenizer.load import load_tokenizer
from megalite.tokenizer.template import open_template
from tests.checkpoint.llamas import save_llama
from tests.conversations import SEQ_LENGTH as CHAT_LENGTH
from tests.conversations import model_of, write_conversations
from tests.reference import transformers_model
from tests.test_muon_equivalence import CLIPS, MUON
from tests.test_preference_equivalence import CONFIGS, global_samples
from tests.trainers import ADAM, BATCH, SEED, SEQ_LENGTH, Case, deepspeed_of, global_batch_of, run_config

WORLD_SIZE, NUM_MICRO_BATCHES = 4, 2
TILE = 24  # tokens of an MLP at a time, in all: of most micro batches the last tile is shorter
LIMIT = 0.05  # of gradient norms: less than those of KTO, which are the smallest
OPTIMIZERS: dict[str, OptimizerConfig] = {"adamw": ADAM, "muon": MUON, "qk-clip": CLIPS}
LORA = LoraConfig(rank=3, alpha=6.0)
PREFERENCES = {task: CONFIGS[task] for task in ("dpo", "kto")}
ChatBatches = tuple[Batch, ...]  # global ones, of real conversations


@dataclass(frozen=True)
class Composition:
    """What meets in one run.

    Attributes:
        before: the layout that takes the first steps and saves, and what must not change the numbers.
        after: the layout that goes on; of the rest only its ZeRO stage, recompute and gathering count.
        optimizer: "adamw", "muon", or "qk-clip", which is Muon with it.
        task: "pretrain", "finetune" on packed conversations, "dpo" or "kto".
        lora: whether adapters are trained in place of weights.
    """

    before: Case
    after: Case
    optimizer: str = "adamw"
    task: str = "pretrain"
    lora: bool = False

    def __post_init__(self) -> None:
        assert self.before.world_size == self.after.world_size == WORLD_SIZE, self
        for name in ("before", "after"):
            case = getattr(self, name)
            tile = TILE if self.before.fp8 == "none" else 0  # fp8 refuses tiles
            more = replace(case, tile=tile, offload=case.recompute == "full")
            object.__setattr__(self, name, more)
        same = ("tied", "precision", "documents", "model_kind", "rule", "padded", "uneven", "fp8")
        object.__setattr__(self, "after", replace(self.after, **{n: getattr(self.before, n) for n in same}))

    def __str__(self) -> str:
        layout = ("tp", "pp", "dp", "cp", "zero", "sp", "way", "schedule", "ep", "recompute", "gathering")
        on = Case(**{name: getattr(self.after, name) for name in layout})
        more = [self.optimizer, self.task, *(["lora"] if self.lora else [])]
        return f"{self.before},{','.join(more)} -> {on}"

    @property
    def model(self) -> ModelConfig:
        if self.task == "finetune":
            return model_of(self.before.model_kind, self.before.tied)
        return self.before.model

    @property
    def seq_length(self) -> int:
        return CHAT_LENGTH if self.task == "finetune" else SEQ_LENGTH

    @property
    def preference(self) -> PreferenceConfig:
        return PREFERENCES.get(self.task, PreferenceConfig())

    def run(self, case: Case, **sections: Any) -> RunConfig:
        """As a run of one of the two layouts."""
        task = "prefer" if self.task in PREFERENCES else self.task
        own = {"task": task, "preference": self.preference, "model": self.model}
        own |= {"data": DataConfig(seq_length=self.seq_length), "lora": LORA if self.lora else LoraConfig()}
        return run_config(case, OPTIMIZERS[self.optimizer], **own | sections)

    def deepspeed(self, case: Case) -> DeepSpeedConfig:
        """Of one of the two layouts."""
        whole, limit = deepspeed_of(case, NUM_MICRO_BATCHES), {"gradient_clipping": LIMIT}
        raw = whole.raw | limit
        if case.precision == "fp16":  # each overflow halves the scale
            raw |= {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}}
        return whole.model_copy(update=limit | {"raw": raw})

    def batch(self, step: int, chats: ChatBatches) -> Batch:
        """The global batch of a step, the same on all ranks."""
        if self.task == "pretrain":
            return global_batch_of(self.before, step)
        if self.task == "finetune":
            return chats[step]
        batch = global_samples(step, self.preference)
        if not self.before.padded:
            return batch
        padded = _padded(batch)
        if batch.mismatched is None:
            return padded
        return replace(padded, mismatched=_padded(batch.mismatched))


def _padded(rows: Batch) -> Batch:
    """With what follows each answer marked as padding, a document of its own, as loaders of pairs do."""
    assert rows.labels is not None
    place = torch.arange(rows.labels.size(1))
    length = torch.where(rows.labels != IGNORED, place + 2, 0).amax(dim=1, keepdim=True)
    padding = place >= length
    return replace(rows, padding=padding, document_starts=torch.where(padding, length, 0))


def parts_of(batch: Batch, dp: Ranks) -> list[Batch]:
    """Of a global batch, the micro batches of one data-parallel rank."""
    return batch.split(dp.size)[dp.rank].split(NUM_MICRO_BATCHES)


def chat_batches(folder: Path, count: int) -> ChatBatches:
    """Global batches of conversations that share samples, through templates, files and packing."""
    write_conversations(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    sources = [str(folder / name) for name in ("one.jsonl", "two.jsonl")]
    chat = open_chat("conversations", sources, tokenizer, open_template(tokenizer), seq_length=CHAT_LENGTH)
    loader = ChatLoader(
        chat.samples(SampleOrder(CHAT_LENGTH, SEED, packing=True, shuffle=True), count * BATCH),
        global_batch_samples=BATCH,
        num_micro_batches=1,
        dp_rank=0,
        dp_size=1,
        vocab_size=model_of().vocab_size,
    )
    return tuple(loader.batch(step * BATCH)[0] for step in range(count))


def save_bases(folder: Path, compositions: Sequence[Composition]) -> None:
    """The weights that adapters are beside, as checkpoints: what `base_of` names."""
    for composition in compositions:
        base = folder / base_of(composition)
        if composition.lora and not base.exists():
            run = RunConfig(model=composition.model, data=DataConfig(train=["none"], tokenizer="bytes"))
            save_llama(base / "checkpoints", transformers_model(composition.model, SEED), run)


def base_of(composition: Composition) -> str:
    """A folder for each model."""
    chats = "chats" if composition.task == "finetune" else "tokens"
    return f"{composition.before.model_kind}-{composition.before.tied}-{chats}"
