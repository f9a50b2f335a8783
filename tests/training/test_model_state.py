"""What a rank holds between steps is what is counted on paper, of whole weights and of adapters."""

import pytest

from megalite.config.tuning import LoraConfig
from megalite.model.flops import model_state_bytes_per_rank
from megalite.training.engine import initialize_communication
from megalite.training.trainer import StageTrainer
from megalite.training.zero import inner_optimizer, is_stage3
from tests.harness import run_distributed
from tests.trainers import ADAM, MODEL, Case, build_trainer, micro_batches

UNPADDED = MODEL.model_copy(update={"vocab_size": 256})  # no padding, over 2 ranks too
WHOLE, LORA = LoraConfig(), LoraConfig(rank=4)
CASES = [
    *((Case(dp=2, zero=zero), LORA) for zero in (0, 1, 2, 3)),
    *((Case(tp=2, zero=zero, precision="bf16"), LORA) for zero in (1, 3)),
    (Case(dp=2, zero=2), WHOLE),
    (Case(dp=2, precision="bf16"), WHOLE),
]


def body(rank: int) -> list[tuple[int, int]]:
    initialize_communication()
    return [held_bytes(build_trainer(rank, case, ADAM, model=UNPADDED, lora=lora)) for case, lora in CASES]


def held_bytes(trainer: StageTrainer) -> tuple[int, int]:
    """Of parameters, and of AdamW's moments, after a step."""
    trainer.train_step(micro_batches(0, trainer.context), 1e-3)
    optimizer = trainer.engine.optimizer
    tensors = [p.ds_tensor if is_stage3(optimizer) else p for p in trainer.engine.module.parameters()]
    inner = inner_optimizer(optimizer)
    moments = [state[kind] for state in inner.state.values() for kind in ("exp_avg", "exp_avg_sq")]
    parameters, state = (sum(t.numel() * t.element_size() for t in held) for held in (tensors, moments))
    return parameters, state


@pytest.fixture(scope="module")
def held() -> list[tuple[int, int]]:
    return run_distributed(body, 2, timeout_seconds=300)[0]


@pytest.mark.parametrize("place", range(len(CASES)), ids=lambda i: f"{CASES[i][0]},r{CASES[i][1].rank}")
def test_a_rank_holds_what_is_counted_on_paper(held, place):
    case, lora = CASES[place]
    expected = model_state_bytes_per_rank(
        UNPADDED,
        tp_size=case.tp,
        dp_size=case.dp,
        zero_stage=case.zero,
        precision=case.precision,
        grad_accum_dtype="fp32",
        lora=lora,
    )
    master_copy = case.precision != "fp32"
    assert held[place] == (expected.parameters, expected.optimizer * (8 / 12 if master_copy else 1))
