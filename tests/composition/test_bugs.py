"""Bugs that others met where features meet, each under the name of its thread, looked for here.

Most are one step on four ranks, compared with one process of transformers: loss, norm, experts' tokens and
every gradient, with the tolerances of tests/test_equivalence.py. docs/composition.md says of each what went
wrong there, and by which change here its test went red.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import sqrt
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.utils import groups

from megalite.batch import IGNORED, Batch
from megalite.config.section import ConfigError
from megalite.model.flops import num_parameters
from megalite.model.llama import LlamaStage
from megalite.training.checkpoints import live_pieces
from megalite.training.command import configure
from megalite.training.engine import initialize_communication
from megalite.training.live_model import LiveModel
from megalite.training.trainer import StageTrainer, build_context
from tests.composition.compositions import chat_batches
from tests.harness import run_distributed
from tests.reference import CLIP, Curve, assert_same_numbers, reference_curve
from tests.test_equivalence import (
    HOLDS_GRADIENTS,
    assert_same_gradients,
    gradients_of_parts,
    parts_of_gradients,
)
from tests.test_lora_equivalence import LORA, fill_adapters
from tests.test_lora_equivalence import expected as expected_of_peft
from tests.test_muon_equivalence import MUON, is_stepped_by_muon, whole_weights
from tests.trainers import (
    BATCH,
    MICRO_BATCH,
    MODEL,
    SEED,
    SEQ_LENGTH,
    Case,
    build_trainer,
    deepspeed_config,
    global_batch,
    global_batch_of,
    micro_batches,
    run_config,
)
from tests.training.test_norm import set_to_one

WORLD_SIZE = 4
WAYS = ("gather", "ring", "heads")
AVERAGED = Case(dp=4, zero=1, uneven=True, padded=True, model_kind="softmax")
LABELS_ON_ONE_RANK = Case(cp=4, zero=1, way="ring")
PADDED_EXPERTS = Case(tp=2, dp=2, ep=2, padded=True, model_kind="softmax")
PADDED_STAGES = Case(pp=2, dp=2, zero=2, padded=True, model_kind="softmax")
CUT_SEQUENCES = [Case(cp=4, way=way, documents=True) for way in WAYS]
EXCHANGED_HEADS = Case(cp=2, dp=2, way="heads", zero=3, uneven=True)
TABLES_USED_TWICE = [Case(dp=4, zero=2, tied=True), Case(pp=2, dp=2, zero=2, schedule="zbv", tied=True)]
ADAPTERS = Case(tp=2, dp=2, zero=1)
STEPS = [AVERAGED, LABELS_ON_ONE_RANK, PADDED_EXPERTS, PADDED_STAGES, *CUT_SEQUENCES, EXCHANGED_HEADS]
STEPS += [*TABLES_USED_TWICE, ADAPTERS]
BIASES, HEAD_NORMS = Case(tp=4, zero=1, model_kind="qkv biases"), Case(tp=4, zero=2, model_kind="norms")
CUT_EXPERTS = Case(tp=2, dp=2, ep=2, model_kind="normed experts")
NORMS = [BIASES, HEAD_NORMS, CUT_EXPERTS]
CHUNKS = [Case(pp=2, dp=2, schedule="interleaved"), Case(pp=2, dp=2, schedule="zbv", zero=1)]
PACKED = [
    *(Case(cp=4, way=way) for way in WAYS),
    Case(cp=2, tp=2, way="heads", zero=2),
    Case(cp=2, pp=2, way="ring", schedule="zb-h1"),
]


class Step(NamedTuple):
    """What a step gave; gradients of full parameters, clipped."""

    loss: float
    norm: float
    tokens: dict[int, list[int]]
    gradients: dict[str, torch.Tensor]


class Found(NamedTuple):
    """Of one rank: by case, what was looked for."""

    steps: dict[Case, Step]
    norms: dict[Case, float]
    initial: dict[Case, dict[str, torch.Tensor]]
    logits: dict[Case, list[torch.Tensor]]
    muon: list[dict[str, torch.Tensor]]  # with two limits of the norm
    hpz: list[float]  # losses with other weights, without and with second partitions


def batch_of(case: Case) -> Batch:
    batch = global_batch_of(case, 0)
    if case != LABELS_ON_ONE_RANK:
        return batch
    # Rank 0 has the first and the last of 8 chunks, of 2 tokens: only the first has labels.
    assert batch.labels is not None
    return replace(batch, labels=batch.labels.where(torch.arange(SEQ_LENGTH) < 2, IGNORED))


def take_step(rank: int, case: Case) -> Step:
    adapters = {"lora": LORA} if case == ADAPTERS else {}
    trainer = build_trainer(rank, case, HOLDS_GRADIENTS, **adapters)
    if adapters:
        fill_adapters(trainer)
        trainer.engine.let_go()
    data = trainer.context["dp"]
    mine = batch_of(case).split(data.size)[data.rank].split(BATCH // data.size // MICRO_BATCH)
    result = trainer.train_step(mine, 1e-3)
    tokens = result.experts.tokens if result.experts else {}
    gradients = gradients_of_parts(parts_of_gradients(trainer), WORLD_SIZE)
    return Step(result.loss, result.grad_norm, tokens, gradients)


def norm_of_ones(rank: int, case: Case) -> float:
    trainer = build_trainer(rank, case)
    batches = micro_batches(0, trainer.context)
    for parameter in trainer.engine.module.parameters():
        set_to_one(parameter, len(batches), trainer.context)
    return trainer.train_step(batches, 1e-3).grad_norm


STARTS = torch.tensor([0, 5, 5 + 4]).repeat_interleave(torch.tensor([5, 4, 7]))  # no edge of a chunk


def logits_of_two(rank: int, case: Case) -> list[torch.Tensor]:
    """[V, s, b] where the head is, of samples that differ in one token of their first document."""
    trainer = build_trainer(rank, case)
    live, ids = LiveModel(trainer), global_batch(0).input_ids
    assert ids is not None
    other = ids.clone()
    other[:, 1] = (other[:, 1] + 1) % MODEL.vocab_size
    with trainer.engine.evaluating():
        batches = [Batch(x, document_starts=STARTS.expand(BATCH, -1)) for x in (ids, other)]
        found = [live._forward(batch) for batch in batches]
    return [logits for logits in found if logits is not None]


def weights_after_muon(rank: int, clip: float) -> dict[str, torch.Tensor]:
    """After one step, in which the momentum is the gradient, with a limit of the gradient's norm."""
    case = Case(tp=2, dp=2, zero=2)
    whole = deepspeed_config(case)
    limit = {"gradient_clipping": clip}
    deepspeed = whole.model_copy(update=limit | {"raw": whole.raw | limit})
    run = run_config(case, MUON)
    trainer = StageTrainer(run, deepspeed, build_context(run, rank, WORLD_SIZE, torch.device("cpu")))
    trainer.train_step(micro_batches(0, trainer.context), 1e-2)
    return whole_weights(trainer, WORLD_SIZE)


def loss_after_loading(rank: int, **zero_options: Any) -> float:
    """With weights that are written from outside, as a checkpoint's are."""
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # made once in a process
    trainer = build_trainer(rank, Case(dp=4), **zero_options)
    batches = micro_batches(0, trainer.context)
    trainer.evaluate(batches)
    for piece in live_pieces(trainer.engine):
        if piece.kind == "weight":
            piece.tensor.mul_(0.5)
    trainer.engine.let_go()
    return trainer.evaluate(batches).mean


def look(rank: int) -> Found:
    initialize_communication()
    return Found(
        {case: take_step(rank, case) for case in STEPS},
        {case: norm_of_ones(rank, case) for case in NORMS},
        {case: whole_weights(build_trainer(rank, case), WORLD_SIZE) for case in CHUNKS},
        {case: logits_of_two(rank, case) for case in PACKED},
        [weights_after_muon(rank, clip) for clip in (CLIP, CLIP / 10)],
        [loss_after_loading(rank), loss_after_loading(rank, zero_hpz_partition_size=2)],
    )


@cache
def found() -> list[Found] | AssertionError:
    """Of all ranks, which are started once."""
    try:
        return run_distributed(look, WORLD_SIZE, timeout_seconds=280)
    except AssertionError as error:
        return error


def of_ranks(get: Callable[[Found], Any]) -> list[Any]:
    ranks = found()
    if isinstance(ranks, AssertionError):
        raise ranks
    return [get(rank) for rank in ranks]


@cache
def reference(case: Case) -> Curve:
    if case == ADAPTERS:
        return expected_of_peft(case, LORA)
    return reference_curve(case.model, [batch_of(case)], SEED)


def assert_one_process(case: Case, *parts: str) -> None:
    """Loss, norm, tokens, and the gradients of parameters whose names have one of these parts, or all."""
    want = reference(case)
    for step in of_ranks(lambda rank: rank.steps[case]):
        assert_same_numbers("loss", [step.loss], want.losses[:1])
        assert_same_numbers("norm", [step.norm], want.norms[:1])
        assert step.tokens == (want.tokens[0] if want.tokens else {})
        names = [n for n in want.gradients if not parts or any(part in n for part in parts)]
        assert names
        assert_same_gradients(
            Curve(gradients={name: step.gradients[name] for name in names}),
            Curve(norms=want.norms[:1], gradients={name: want.gradients[name] for name in names}),
        )


def test_megatron_lm_7452_a_loss_is_divided_by_the_tokens_of_all_data_ranks():
    assert_one_process(AVERAGED)


def test_megatron_lm_7498_and_mcore_bridge_104_a_rank_of_cp_without_a_label_adds_nothing():
    assert_one_process(LABELS_ON_ONE_RANK)


def test_megatron_lm_7452_the_padding_mask_of_experts_is_of_all_ranks_of_tp():
    assert PADDED_EXPERTS.sp
    assert_one_process(PADDED_EXPERTS, ".gate.")


def test_megatron_lm_5916_6080_and_6470_gradients_of_experts_cut_over_ep_and_tp_are_those_of_one_process():
    assert_one_process(PADDED_EXPERTS, ".experts.")


def test_megatron_lm_1984_6111_and_megatron_bridge_6103_padding_is_no_load_of_experts():
    assert_one_process(PADDED_STAGES)
    padding = batch_of(PADDED_STAGES).padding
    assert padding is not None
    choices = int((~padding).sum()) * PADDED_STAGES.model.num_experts_per_tok
    for step in of_ranks(lambda rank: rank.steps[PADDED_STAGES]):
        assert [sum(counts) for counts in step.tokens.values()] == [choices] * len(step.tokens)


@pytest.mark.parametrize("case", CUT_SEQUENCES, ids=str)
def test_megatron_lm_1464_gradients_through_attention_of_a_cut_sequence_are_those_of_one_process(case):
    assert_one_process(case, "q_proj", "k_proj", "v_proj")


def test_deepspeed_5248_and_7458_exchanged_heads_under_zero_3_are_averaged_over_all_that_share_weights():
    assert_one_process(EXCHANGED_HEADS)


@pytest.mark.parametrize("case", TABLES_USED_TWICE, ids=str)
def test_deepspeed_8224_a_table_that_is_used_twice_under_zero_2_has_both_gradients(case):
    assert_one_process(case, "embed_tokens")


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_mcore_bridge_173_and_megatron_bridge_5634_a_whole_factor_has_the_gradients_of_all_ranks(
    factor,
):
    assert ADAPTERS.sp
    assert_one_process(ADAPTERS, factor)


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_megatron_lm_7530_6080_and_transformer_engine_715_a_parameter_counts_once_in_the_norm(case):
    """Biases cut by heads, norms of heads that all ranks hold, and experts cut over ep and tp."""
    expected = sqrt(num_parameters(case.model))
    assert of_ranks(lambda rank: rank.norms[case]) == [pytest.approx(expected, rel=1e-5)] * WORLD_SIZE


@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_olmo_core_chunks_of_a_rank_do_not_begin_alike(case):
    ours = LlamaStage(case.model, seed=SEED)
    alone = {p.spec.name: p.detach()[: p.spec.box_shape[0]] for p in ours.parameters()}
    for weights in of_ranks(lambda rank: rank.initial[case]):
        assert weights.keys() == alone.keys()
        assert all(weights[name].equal(weight) for name, weight in alone.items())
        queries = [weight for name, weight in weights.items() if name.endswith("q_proj.weight")]
        assert len(queries) == case.model.num_hidden_layers
        assert not any(one.equal(other) for i, one in enumerate(queries) for other in queries[:i])


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_trl_6843_a_token_of_the_first_document_changes_no_bit_of_later_ones(case):
    is_later = STARTS > 0
    pairs = [pair for pair in of_ranks(lambda rank: rank.logits[case]) if pair]
    assert len(pairs) == WORLD_SIZE // case.pp
    for one, other in pairs:
        assert one.shape == (MODEL.vocab_size, SEQ_LENGTH, BATCH // case.dp)
        assert one[:, is_later].equal(other[:, is_later])
        changed = (one != other).any(0).all(1)  # its own place, and those after it
        assert changed.tolist() == [1 <= place < 5 for place in range(SEQ_LENGTH)]


def test_deepspeed_8439_clipping_does_not_shorten_the_steps_of_muon():
    """An orthogonal update has no length of its own: however small a gradient was made, matrices agree.

    1e-4 is allowed for the 1e-7 beside the norm, which Newton-Schulz makes some hundreds of; at this rate a
    step moves single weights by 1e-3 and more.
    """
    for plain, clipped in of_ranks(lambda rank: rank.muon):
        matrices = [name for name, weight in plain.items() if is_stepped_by_muon(name, weight)]
        assert len(matrices) == 7 * MODEL.num_hidden_layers
        for name in matrices:
            torch.testing.assert_close(clipped[name], plain[name], rtol=0, atol=1e-4)


def test_deepspeed_7606_and_8210_second_partitions_do_not_outlive_weights_that_are_loaded():
    for plain, with_second in of_ranks(lambda rank: rank.hpz):
        assert with_second == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        (["parallel.tp_size=2"], {"stage": 3, "zero_hpz_partition_size": 2}, "under parallel.tp_size 2"),
        (["parallel.pp_size=2"], {"stage": 3, "zero_hpz_partition_size": 2}, "under parallel.pp_size 2"),
        ([], {"stage": 1, "round_robin_gradients": True}, "round_robin_gradients puts"),
    ],
)
def test_deepspeed_4851_5059_and_7164_what_it_does_wrong_in_silence_is_refused(
    settings, options, words, tmp_path
):
    def start(options: dict[str, Any], settings: list[str]) -> None:
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps({"train_batch_size": 8, "zero_optimization": options}))
        configure(["--deepspeed_config", str(path), *settings], WORLD_SIZE, "pretrain")

    start({"stage": options["stage"]}, settings)
    start(options | {"stage": 3}, [])
    with pytest.raises(ConfigError, match=words) as refusal:
        start(options, settings)
    assert "\n" not in str(refusal.value)


def test_trl_labels_of_packed_conversations_end_with_them(tmp_path):
    """The last token of each is asked for nothing, and labels are as many as tokens."""
    (batch,) = chat_batches(tmp_path, 1)
    assert batch.input_ids is not None and batch.labels is not None and batch.document_starts is not None
    assert batch.labels.shape == batch.input_ids.shape
    starts = batch.document_starts
    is_last = starts != torch.cat([starts[:, 1:], torch.full_like(starts[:, :1], -1)], dim=1)
    assert is_last.sum() > 2 * BATCH and (batch.labels[is_last] == IGNORED).all()
    counted = (batch.labels != IGNORED)[:, :-1]
    assert counted.any() and batch.labels[:, :-1][counted].equal(batch.input_ids[:, 1:][counted])
