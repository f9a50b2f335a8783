"""A run of adapters, from a Hugging Face folder and PEFT's to its checkpoints, in other layouts, and out.

One world of two ranks for each kind of model does it all; the tests look at what it left and said.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import megalite
from megalite.checkpoint.base import Base, base_of
from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.load import TensorReader, read_config
from megalite.checkpoint.model import load_stage
from megalite.checkpoint.peft_folder import PeftFolder, export_adapter
from megalite.config.checkpoint import CheckpointConfig
from megalite.config.tuning import LoraConfig
from megalite.model.decoding import decoding_context
from megalite.parallel.plan import LayerPlan
from megalite.training.checkpoints import Checkpoints
from megalite.training.engine import initialize_communication
from megalite.training.trainer import StageTrainer, build_context
from megalite.training.world import gather
from tests.checkpoint.llamas import random_llama
from tests.checkpoint.worlds import same_bits
from tests.harness import run_distributed
from tests.reference import mean_loss
from tests.trainers import ADAM, MODELS, Case, deepspeed_config, global_batch, micro_batches, run_config

STOP, LAST, UNSEEN = 2, 4, 9
LORA = {"rank": 2, "alpha": 5.0, "targets": ["q_proj", "v_proj", "o_proj", "up_proj"]}


@dataclass(frozen=True)
class Kind:
    """A model, the layout that it is trained in, and the one that it moves to."""

    before: Case
    after: Case
    theirs: dict[str, Any]  # PEFT's names of the targets


KINDS = {
    "dense": Kind(
        Case(tp=2, zero=1, tied=True), Case(pp=2, zero=2, tied=True), {"target_modules": LORA["targets"]}
    ),
    "experts": Kind(
        Case(dp=2, zero=3, precision="bf16", model_kind="normed experts", ep=2),
        Case(tp=2, zero=1, precision="bf16", model_kind="normed experts"),
        {
            "target_modules": ["q_proj", "v_proj", "o_proj"],
            "target_parameters": ["mlp.up_proj.weight", "shared_experts.up_proj.weight"],
        },
    ),
}


@dataclass
class Run:
    """What a process of a run does: it resumes or begins, and trains."""

    rank: int
    case: Case
    folder: Path
    start: dict[str, Any] = field(default_factory=dict)  # of the checkpoint section
    lora: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sections = {"lora": LoraConfig(**LORA | self.lora), "checkpoint": CheckpointConfig(**self.start)}
        run = run_config(self.case, output_dir=str(self.folder), **sections)
        context = build_context(run, self.rank, self.case.world_size, torch.device("cpu"))
        self.trainer = StageTrainer(run, deepspeed_config(self.case), context)
        self.said: list[str] = []
        self.checkpoints = Checkpoints(run, deepspeed_config(self.case), self.rank, self.said.append)

    def resume(self) -> "Run":
        self.step = self.checkpoints.resume(self.trainer.engine)
        return self

    def save(self, step: int) -> None:
        self.checkpoints.save(self.trainer.engine, step)

    def train(self, first: int, last: int) -> list[tuple[float, float]]:
        curve = []
        for step in range(first, last + 1):
            batches = micro_batches(step, self.trainer.context, self.case)
            result = self.trainer.train_step(batches, ADAM.learning_rate)
            curve.append((result.loss, result.grad_norm))
        return curve

    def loss(self) -> float:
        return self.trainer.evaluate(micro_batches(UNSEEN, self.trainer.context, self.case)).mean


def live(rank: int, kind: Kind, root: Path) -> dict[str, Any]:
    """All that happens on a rank, by what it shows."""
    initialize_communication()
    seen: dict[str, Any] = {}
    options = {"start": {"start_from": str(root / "hf")}, "lora": {"start_from": str(root / "peft")}}
    first = Run(rank, kind.before, root / "run", **options).resume()
    seen["before"], seen["said"] = first.loss(), first.said
    first.save(1)
    seen["curve"] = first.train(1, STOP)
    first.save(STOP)
    seen["trained"] = first.loss()
    seen["rest"] = first.train(STOP + 1, LAST)
    again = Run(rank, kind.before, root / "run").resume()  # it needs neither folder any more
    seen["resumed"], seen["rest again"] = (again.step, again.loss()), again.train(STOP + 1, LAST)
    moved = Run(rank, kind.after, root / "run").resume()
    seen["moved"] = moved.step, moved.loss()
    moved.checkpoints.root = root / "other" / "checkpoints"
    moved.save(STOP)
    seen["rest moved"] = moved.train(STOP + 1, LAST)
    seen["refused"] = refusals(rank, kind.before, root)
    seen["stage"] = loss_of_stage(rank, root / "run" / "checkpoints" / f"step-{STOP:08}")
    return seen


def refusals(rank: int, case: Case, root: Path) -> list[str]:
    """What is said of runs that cannot go on, or begin."""
    run, start = root / "run", {"start_from": str(root / "run" / "start")}
    attempts = [
        Run(rank, case, root / "fresh"),
        Run(rank, case, root / "fresh", start, {"start_from": str(root / "peft"), "alpha": 6.0}),
        Run(rank, case, run, lora={"alpha": 6.0}),
        Run(rank, case, run, lora={"rank": 0}),
    ]
    told = []
    for attempt in attempts:
        with pytest.raises(CheckpointError) as caught:
            attempt.resume()
        told.append(str(caught.value))
    with pytest.raises(CheckpointError, match=r"and there are none: name them with checkpoint\.start_from"):
        attempts[0].save(1)
    return told


def loss_of_stage(rank: int, checkpoint: Path) -> float:
    """Of the merged model, cut over both ranks, as tools/generate.py reads it."""
    model = read_config(checkpoint).model
    plan = LayerPlan(decoding_context(model, torch.device("cpu"), rank, 2), dtype=torch.float32)
    stage = load_stage(checkpoint, model, plan, gather)
    with torch.no_grad():
        batch = global_batch(UNSEEN)
        return (stage(None, batch) / batch.labels.numel()).item()


@cache
def lived(name: str, root: Path) -> list[dict[str, Any]]:
    """What each rank saw. The folders that it began with are gone when this returns."""
    kind, folder = KINDS[name], root / name
    llama = random_llama(kind.before.model)
    llama.save_pretrained(folder / "hf")
    torch.manual_seed(3)
    config = PeftConfig(task_type="CAUSAL_LM", r=LORA["rank"], lora_alpha=LORA["alpha"], **kind.theirs)
    model: Any = get_peft_model(llama, config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.6)
    model.save_pretrained(folder / "peft")
    seen = run_distributed(live, 2, kind, folder, timeout_seconds=400)
    with torch.no_grad(), model.disable_adapter():
        seen[0]["without"] = mean_loss(model, global_batch(UNSEEN)).item()
    with torch.no_grad():
        seen[0]["theirs"] = mean_loss(model, global_batch(UNSEEN)).item()
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def checkpoint_of(root: Path, name: str, run: str = "run", step: int = STOP) -> Path:
    return root / name / run / "checkpoints" / f"step-{step:08}"


@pytest.fixture(params=KINDS)
def name(request) -> str:
    return request.param


def tolerance(name: str) -> float:
    """Of losses: float32 sums in another order, or bf16's 8 bits."""
    return 1e-5 if KINDS[name].before.precision == "fp32" else 2e-2


def test_a_run_begins_with_the_adapter_that_peft_saved(root, name):
    seen = lived(name, root)[0]
    assert seen["before"] == pytest.approx(seen["theirs"], rel=tolerance(name))
    assert seen["without"] != pytest.approx(seen["theirs"], rel=2 * tolerance(name))
    assert f"starts with the adapter of {root / name / 'peft'}" in seen["said"]
    (first, _), (second, _) = seen["curve"]
    assert first != second


def test_peft_folder_in_and_out_again_is_the_same_bit_for_bit(root, name):
    lived(name, root)
    where = root / name / "untouched"
    export_adapter(checkpoint_of(root, name, step=1), where, "float32")
    there, here = PeftFolder(root / name / "peft"), PeftFolder(where)
    assert here.tensors.keys() == there.tensors.keys() and here.lora == there.lora
    assert all(same_bits(here.tensors[key], tensor) for key, tensor in there.tensors.items())


def test_a_checkpoint_holds_adapters_alone_and_names_its_base(root, name):
    lived(name, root)
    checkpoint = checkpoint_of(root, name)
    reader = TensorReader(checkpoint)
    adapter = PeftFolder(root / name / "peft").tensors
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    assert set(reader.shapes) == {(kind, key) for kind in kinds for key in adapter}
    numbers = sum(tensor.numel() for tensor in adapter.values())
    files = [path.stat().st_size for path in checkpoint.glob("*.safetensors")]
    overhead = 400 * 3 * len(adapter) * len(files)  # of headers: a row for each piece
    assert 3 * 4 * numbers <= sum(files) <= 3 * 4 * numbers + overhead
    base = root / name / "run" / "start" / "step-00000000"
    assert base_of(checkpoint) == Base.of(base)


def test_it_resumes_bit_for_bit(root, name):
    for seen in lived(name, root):
        assert seen["resumed"] == (STOP, seen["trained"])
        assert seen["rest again"] == seen["rest"] != seen["curve"]


def test_another_layout_has_the_same_bits_and_goes_on(root, name):
    """Exact state, then the arithmetic of another layout."""
    seen = lived(name, root)[0]
    before, after = (TensorReader(checkpoint_of(root, name, run)) for run in ("run", "other"))
    assert before.shapes == after.shapes
    for kind, key in before.shapes:
        assert same_bits(before.read(kind, key), after.read(kind, key)), (kind, key)
    assert seen["moved"] == (STOP, pytest.approx(seen["trained"], rel=tolerance(name)))
    moved, rest = torch.tensor(seen["rest moved"]), torch.tensor(seen["rest"])
    torch.testing.assert_close(moved, rest, rtol=max(1e-4, 2 * tolerance(name)), atol=0)
    assert base_of(checkpoint_of(root, name, "other")) == base_of(checkpoint_of(root, name))


def test_the_merged_model_has_the_loss_of_the_run(root, name):
    ranks = lived(name, root)
    with torch.no_grad():
        model = megalite.load(checkpoint_of(root, name))
        loss = mean_loss(model, global_batch(UNSEEN)).item()
    assert loss == pytest.approx(ranks[0]["trained"], rel=tolerance(name))
    assert loss != pytest.approx(ranks[0]["before"], rel=1e-4)
    for seen in ranks:
        assert seen["stage"] == pytest.approx(loss, rel=1e-5)


def test_peft_has_the_loss_of_the_run(root, name):
    seen = lived(name, root)[0]
    where = root / name / "exported"
    export_adapter(checkpoint_of(root, name), where, "float32")
    theirs: Any = AutoModelForCausalLM.from_pretrained(root / name / "hf", dtype=torch.float32)
    model = PeftModel.from_pretrained(theirs, where)
    with torch.no_grad():
        loss = mean_loss(model, global_batch(UNSEEN)).item()
    assert loss == pytest.approx(seen["trained"], rel=tolerance(name))
    assert model.peft_config["default"].base_model_name_or_path == str(root / name / "hf")


def test_what_does_not_go_on_is_refused_in_one_line(root, name):
    messages = [
        "lora.rank 2 trains adapters of weights that are there, and there are none",
        "lora.alpha is 5.0 in ",
        f"lora.alpha is 5.0 in {checkpoint_of(root, name)} and 6.0 in this run: say lora.alpha=5.0, or",
        f"lora.rank is 2 in {checkpoint_of(root, name)} and 0 in this run: say lora.rank=2, or",
    ]
    told = lived(name, root)[0]["refused"]
    for line, message in zip(told, messages, strict=True):
        assert message in line and "\n" not in line


def test_kinds_are_models_of_ours():
    assert {kind.before.model_kind for kind in KINDS.values()} <= MODELS.keys()
