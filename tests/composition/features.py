"""What may meet in a run, by name; which pairs never do, and which are refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from tests.composition.compositions import PREFERENCES, Composition
from tests.trainers import Case

SCHEDULES = {"1f1b": "1F1B", "afab": "AFAB", "interleaved": "interleaved", "zb-h1": "ZB-H1", "zbv": "ZBV"}
WAYS = {way: f"cp, {way}" for way in ("gather", "ring", "heads")}
ZERO = [f"ZeRO-{stage}" for stage in range(4)]
OPTIMIZERS = {"adamw": {"AdamW"}, "muon": {"Muon"}, "qk-clip": {"Muon", "QK-clip"}}


@dataclass(frozen=True)
class Switch:
    """How a user turns a feature on: settings of the run, and of the DeepSpeed JSON."""

    run: tuple[str, ...] = ()
    deepspeed: Mapping[str, Any] = field(default_factory=dict)


def _zero(stage: int) -> Switch:
    return Switch(deepspeed={"zero_optimization": {"stage": stage}})


def _pipeline(schedule: str) -> Switch:
    return Switch(("parallel.pp_size=2", f"parallel.pipeline_schedule={schedule}"))


def _context(way: str) -> Switch:
    return Switch(("parallel.cp_size=2", f"parallel.context_attention={way}"))


_EXPERTS = ("model.n_routed_experts=4", "model.num_experts_per_tok=2", "model.moe_intermediate_size=32")
_MUON = ("optimizer.name=muon",)

# In the order of the page. Those without settings are of the data, or of every run.
FEATURES: dict[str, Switch] = {
    "dp": Switch(),
    "tp": Switch(("parallel.tp_size=2", "parallel.sequence_parallel=false")),
    "sequence parallel": Switch(("parallel.tp_size=2",)),
    **{name: _context(way) for way, name in WAYS.items()},
    **{name: _pipeline(schedule) for schedule, name in SCHEDULES.items()},
    "experts": Switch(_EXPERTS),
    "ep": Switch((*_EXPERTS, "parallel.ep_size=2")),
    **{name: _zero(stage) for stage, name in enumerate(ZERO)},
    "recompute, selective": Switch(("parallel.recompute=selective",)),
    "recompute, full": Switch(("parallel.recompute=full",)),
    "tiles": Switch(("parallel.mlp_tile_tokens=8",)),
    "offload": Switch(("parallel.recompute=full", "parallel.offload_activations=true")),
    "tied embeddings": Switch(("model.tie_word_embeddings=true",)),
    "document masks": Switch(("data.mask_documents=true",)),
    "padding": Switch(),
    "uneven labels": Switch(),
    "token weights": Switch(),
    "LoRA": Switch(("lora.rank=4",)),
    "AdamW": Switch(("optimizer.name=adamw",)),
    "Muon": Switch(_MUON),
    "QK-clip": Switch((*_MUON, "optimizer.muon.qk_clip=100")),
    "bf16": Switch(deepspeed={"bf16": {"enabled": True}}),
    "fp16": Switch(deepspeed={"fp16": {"enabled": True}}),
    "fp8": Switch(("fp8.recipe=rowwise_with_gw_hp",)),
    "clipping": Switch(deepspeed={"gradient_clipping": 0.5}),
    "guards": Switch(("guard.spike_sigma=6",)),
    "asynchronous saves": Switch(("checkpoint.asynchronous=true",)),
    "local saves": Switch(("checkpoint.local_dir=disk",)),
    "resumed in another layout": Switch(),
    "evaluation": Switch(),
    "SFT": Switch(),
    "packing": Switch(("data.packing=true",)),
    "DPO": Switch(),
    "KTO": Switch(),
}
NAMES = list(FEATURES)
Pair = frozenset[str]
ALL_PAIRS = [frozenset(pair) for pair in combinations(NAMES, 2)]


def _between(one: str, others: list[str]) -> list[Pair]:
    return [frozenset((one, other)) for other in others]


def _choices(*names: str) -> list[Pair]:
    return [frozenset(pair) for pair in combinations(names, 2)]


# Of these a run has one.
CHOICES: list[Pair] = [
    *_choices(*WAYS.values()),
    *_choices(*SCHEDULES.values()),
    *_choices(*ZERO),
    *_choices("recompute, selective", "recompute, full"),
    *_choices("recompute, selective", "offload"),
    *_choices("AdamW", "Muon"),
    *_choices("SFT", "DPO", "KTO"),
]
# Pairs that no run can have, and why.
IMPOSSIBLE: dict[Pair, str] = {
    **dict.fromkeys(CHOICES, "one or the other"),
    **dict.fromkeys(_between("packing", ["DPO", "KTO"]), "an answer has a row of its own"),
    **dict.fromkeys(
        _between("token weights", ["SFT", "packing", "DPO", "KTO"]), "conversations give no weights"
    ),
}
# Pairs that a launcher refuses, and words of what it says then.
REFUSED: dict[Pair, str] = {
    **dict.fromkeys(_between("ep", ZERO[:3]), "needs ZeRO stage 3"),
    **dict.fromkeys(_between("LoRA", ["ZB-H1", "ZBV"]), "computes their gradients apart"),
    **dict.fromkeys(_between("LoRA", ["Muon", "QK-clip"]), "steps whole matrices"),
    **dict.fromkeys(_between("QK-clip", list(WAYS.values())), "looks at whole sequences"),
    frozenset(("QK-clip", "AdamW")): "has no use for the settings of muon",
    **dict.fromkeys(_between("ZeRO-0", ["bf16", "fp16"]), "gives a wrong gradient norm"),
    frozenset(("bf16", "fp16")): "both enabled",
    frozenset(("fp8", "fp16")): "rounds bf16",
    frozenset(("fp8", "tiles")): "would scale each tile by itself",
}

ALWAYS = {"clipping"}  # of all runs that are compared, in every step
BETWEEN_STEPS = {"guards", "asynchronous saves", "local saves", "resumed in another layout", "evaluation"}


def features_of_case(case: Case) -> set[str]:
    """Of a layout and its data. ZeRO counts where there is something to partition."""
    found = {"dp": case.dp > 1, "tp": case.tp > 1, "sequence parallel": case.tp > 1 and case.sp}
    found |= {WAYS[case.way]: case.cp > 1, SCHEDULES[case.schedule]: case.pp > 1}
    found |= {"experts": case.model.n_routed_experts > 0, "ep": case.ep > 1}
    found |= {ZERO[case.zero]: case.zero == 0 or case.dp * case.cp > 1}
    found |= {f"recompute, {case.recompute}": case.recompute != "none", "tied embeddings": case.tied}
    found |= {"tiles": case.tile > 0, "offload": case.offload}
    found |= {"document masks": case.documents, "padding": case.padded}
    found |= {"uneven labels": case.uneven, "token weights": case.uneven}
    found |= {case.precision: case.precision != "fp32", "fp8": case.fp8 != "none"}
    return {name for name, is_on in found.items() if is_on} | ALWAYS


def pairs_within(features: set[str]) -> set[Pair]:
    """What a comparison with one process shows of these; one in few bits shows little but of its format."""
    pairs = {frozenset(pair) for pair in combinations(features, 2)}
    formats = features & {"bf16", "fp16"} or features & {"fp8"}
    return {pair for pair in pairs if pair & formats} if formats else pairs


def pairs_of(composition: Composition) -> set[Pair]:
    """What meets in either layout: what is of one alone and what of the other do not."""
    common = OPTIMIZERS[composition.optimizer] | BETWEEN_STEPS | ({"LoRA"} if composition.lora else set())
    common |= {
        "pretrain": set(),
        "finetune": {"SFT", "packing", "padding", "document masks", "uneven labels"},
        "dpo": {"DPO", "uneven labels"},
        "kto": {"KTO", "uneven labels"},
    }[composition.task]
    if composition.task in PREFERENCES and composition.before.padded:
        common.add("document masks")  # what fills up a row is one of its own
    halves = [features_of_case(case) | common for case in (composition.before, composition.after)]
    return pairs_within(halves[0]) | pairs_within(halves[1])
