"""Several chunks of a model per rank in one engine give the run of one process, at each stage of ZeRO.

Two stages hold two chunks each, so an activation passes through the ranks twice. Three steps at least: what a
wrong accumulation adds is the gradient of the step before.
"""

import pytest
import torch

from megalite.batch import Batch
from megalite.config.deepspeed import DeepSpeedConfig
from megalite.model.llama import LlamaStage
from megalite.model.share import StageShare
from megalite.optimizer.recipes import build_recipe
from megalite.parallel.plan import LayerPlan
from megalite.pipeline.p2p import Peers
from megalite.pipeline.runner import PipelineRunner
from megalite.pipeline.schedule import Action, Backward, Exchange, Forward, Transfer, with_last_backward
from megalite.training import engine as engine_module
from megalite.training.engine import StageEngine, initialize_communication
from megalite.training.trainer import build_context
from tests.harness import run_distributed
from tests.reference import reference_curve
from tests.trainers import (
    ADAM,
    MICRO_BATCH,
    MODEL,
    SEED,
    SEQ_LENGTH,
    Case,
    deepspeed_config,
    global_batch,
    run_config,
)

NUM_STEPS, STAGES, CHUNKS = 4, 2, 2
# Which micro batch goes through which chunk, forward and backward in turn as far as that is possible.
ORDER = "F0.0 F0.1 F1.0 B0.1 F1.1 B0.0 B1.1 F2.0 F2.1 F3.0 B2.1 F3.1 B2.0 B3.1 B1.0 B3.0"


def actions_of(stage: int) -> list[Action]:
    """Chunk c of stage p is at depth 2c + p; each result is sent on, and taken in by the other, at once."""
    actions: list[Action] = []
    for word in ORDER.split():
        micro_batch, chunk = int(word[1]), int(word[3])
        forward = word[0] == "F"
        kind, following = ("activation", chunk + 1) if forward else ("gradient", chunk - 1)
        turns_back = 0 <= following < CHUNKS

        def transfer(verb, chunk, kind=kind, micro_batch=micro_batch):
            return Exchange((Transfer(verb, kind, micro_batch, 1 - stage, chunk),))

        compute = Forward(micro_batch, chunk) if forward else Backward(micro_batch, chunk)
        if stage == (0 if forward else 1):
            actions += [compute, transfer("send", chunk)]
            actions += [transfer("receive", following)] if turns_back else []
        else:
            actions += [transfer("receive", chunk), compute]
            actions += [transfer("send", chunk)] if turns_back else []
    return with_last_backward(actions)


def train_in_chunks(rank: int, case: Case, with_clearing: bool) -> list[tuple[float, float]]:
    """(sum of losses here, norm) per step."""
    initialize_communication()
    if not with_clearing:
        engine_module.clear_gradients = lambda optimizer: None
    context = build_context(run_config(case), rank, case.world_size, torch.device("cpu"))
    stage, dp = context["pp"].rank, context["dp"]
    depths = [STAGES * chunk + stage for chunk in range(CHUNKS)]
    shares = [StageShare(range(d, d + 1), d == 0, d == STAGES * CHUNKS - 1) for d in depths]
    engine = StageEngine(
        lambda: [LlamaStage(MODEL, LayerPlan(context), share, seed=SEED) for share in shares],
        build_recipe(ADAM),
        twice_the_batch(case),
        context,
        num_micro_batches=4,
        parameter_gathering=case.gathering,
    )
    peers = Peers(
        context["pp"].group, (SEQ_LENGTH, MICRO_BATCH, MODEL.hidden_size), engine.dtype, context.device
    )
    runner = PipelineRunner(engine, peers, loss_chunk=1 if stage == STAGES - 1 else None)
    results = []
    for step in range(NUM_STEPS):
        batches = double_batch(step).split(dp.size)[dp.rank].split(4)
        engine.begin_step()
        count = dp.size * sum(float(batch.loss_count()) for batch in batches)
        losses = runner.train(actions_of(stage), batches, torch.tensor(dp.size / count))
        norm = engine.step(3e-3 * (1 + step % 3))
        results.append((float(losses) / count if losses is not None else 0.0, norm))
    return results


def twice_the_batch(case: Case) -> DeepSpeedConfig:
    config = deepspeed_config(case)
    facts = {"train_batch_size": 2 * config.train_batch_size}
    return config.model_copy(update=facts | {"raw": config.raw | facts})


def double_batch(step: int) -> Batch:
    """Four micro batches for each of two data-parallel ranks."""
    parts = [global_batch(2 * step), global_batch(2 * step + 1)]
    return Batch(*(torch.cat([getattr(p, name) for p in parts]) for name in ("input_ids", "labels")))


CASES = [Case(pp=2, dp=2, zero=zero) for zero in (1, 2, 3)] + [Case(pp=2, dp=2, gathering="micro_batch")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_chunks_per_stage_are_the_run_of_one_process(case):
    expected = reference_curve(MODEL, [double_batch(step) for step in range(NUM_STEPS)], SEED)
    ranks = run_distributed(train_in_chunks, case.world_size, case, True)
    losses = torch.tensor([[loss for loss, _ in rank] for rank in ranks]).sum(0)
    torch.testing.assert_close(losses, torch.tensor(expected.losses), rtol=2e-5, atol=0)
    for rank in ranks:
        norms = torch.tensor([norm for _, norm in rank])
        torch.testing.assert_close(norms, torch.tensor(expected.norms), rtol=2e-5, atol=0)


def test_control_without_clearing_zero_3_adds_the_gradients_of_the_step_before():
    expected = reference_curve(MODEL, [double_batch(step) for step in range(NUM_STEPS)], SEED)
    ranks = run_distributed(train_in_chunks, 4, Case(pp=2, dp=2), False)
    relative = [abs(norm / want - 1) for (_, norm), want in zip(ranks[0], expected.norms, strict=True)]
    assert relative[0] < 2e-5 and max(relative[1:]) > 1e-2
