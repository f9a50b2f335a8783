"""The compositions that are run: few, so that all pairs of features meet that the other tests leave apart.

They were drawn at random, each time the one of many that has most of the pairs that are missing. Pairs that
have neither bf16 nor fp16 count in fp32 alone. When a feature is added, tests/composition/test_page.py says
which pairs are missing: add compositions that have them.
"""

from tests.composition.compositions import Composition
from tests.trainers import Case

H, V, L = "zb-h1", "zbv", "interleaved"
# Of all recipes the one that takes any number of tokens, and whose scales a micro batch does not change.
FP8 = {"fp8": "rowwise_with_gw_hp", "model_kind": "deep aligned"}
FP8_EXPERTS = FP8 | {"model_kind": "deep aligned experts"}
COMPOSITIONS = [
    Composition(
        Case(
            pp=2,
            dp=2,
            zero=1,
            schedule="afab",
            tied=True,
            recompute="selective",
            model_kind="experts",
            padded=True,
        ),
        Case(tp=2, dp=2, recompute="full", ep=2),
        optimizer="qk-clip",
        task="kto",
    ),
    Composition(
        Case(cp=4, zero=2, way="ring", recompute="full"),
        Case(dp=2, cp=2, zero=0, way="heads", recompute="full"),
        task="finetune",
        lora=True,
    ),
    Composition(
        Case(pp=4, zero=1, schedule=H, tied=True, model_kind="experts", padded=True),
        Case(tp=2, pp=2, zero=2, schedule=L, recompute="selective"),
        optimizer="qk-clip",
        task="dpo",
    ),
    Composition(
        Case(pp=2, dp=2, zero=1, schedule=V, tied=True, recompute="selective"),
        Case(pp=2, cp=2, zero=0, schedule="afab", recompute="selective"),
        optimizer="muon",
        task="finetune",
    ),
    Composition(
        Case(tp=4, tied=True, recompute="full", precision="fp16", model_kind="softmax"),
        Case(pp=2, dp=2, schedule=V, recompute="full", ep=2),
        optimizer="qk-clip",
        task="finetune",
    ),
    Composition(
        Case(pp=4, zero=0, recompute="selective", model_kind="softmax", padded=True, uneven=True),
        Case(pp=2, dp=2, schedule=H, recompute="full", ep=2),
        optimizer="qk-clip",
    ),
    Composition(
        Case(pp=2, dp=2, zero=2, schedule="afab", recompute="full", precision="bf16", model_kind="experts"),
        Case(dp=4, zero=1, recompute="selective"),
        optimizer="qk-clip",
        task="finetune",
    ),
    Composition(
        Case(cp=4, zero=2, tied=True, recompute="selective", precision="fp16", model_kind="experts"),
        Case(pp=2, cp=2, zero=2, way="ring", schedule=L),
        task="kto",
        lora=True,
    ),
    Composition(
        Case(pp=2, cp=2, schedule=V, tied=True, recompute="selective", model_kind="experts", ep=2),
        Case(pp=2, cp=2, way="ring", schedule=H, ep=2),
        task="finetune",
    ),
    Composition(
        Case(pp=2, cp=2, zero=1, way="heads", schedule=H, tied=True, recompute="full"),
        Case(pp=4, schedule=H, recompute="selective"),
        task="kto",
    ),
    Composition(
        Case(pp=2, dp=2, schedule=L, tied=True, recompute="selective", model_kind="softmax", ep=2),
        Case(pp=2, dp=2, zero=2, schedule=V),
        optimizer="qk-clip",
        task="finetune",
    ),
    Composition(
        Case(pp=2, cp=2, schedule=L, recompute="full", padded=True),
        Case(pp=2, cp=2, zero=2, way="ring", schedule=L, recompute="selective"),
        optimizer="muon",
        task="kto",
    ),
    Composition(
        Case(
            pp=2,
            cp=2,
            way="heads",
            schedule="afab",
            tied=True,
            recompute="selective",
            model_kind="softmax",
            ep=2,
        ),
        Case(tp=2, pp=2, schedule=L),
        task="dpo",
        lora=True,
    ),
    Composition(
        Case(tp=2, pp=2, zero=2, tied=True, precision="fp16", model_kind="softmax", padded=True, uneven=True),
        Case(pp=2, cp=2, way="heads", schedule="afab", recompute="selective", ep=2),
        lora=True,
    ),
    Composition(
        Case(dp=2, cp=2, way="ring", tied=True, precision="bf16", model_kind="softmax", uneven=True),
        Case(pp=2, cp=2, zero=2, way="heads", schedule=L),
        lora=True,
    ),
    Composition(
        Case(dp=4, zero=1, tied=True, precision="fp16"),
        Case(tp=2, pp=2, schedule=H, recompute="full"),
        optimizer="qk-clip",
        task="dpo",
    ),
    Composition(
        Case(dp=4, zero=2, model_kind="experts", uneven=True),
        Case(pp=2, cp=2, zero=1, way="heads", schedule=L),
        optimizer="muon",
    ),
    Composition(
        Case(pp=2, cp=2, zero=2, schedule=H, tied=True, recompute="selective", uneven=True),
        Case(dp=2, cp=2, zero=0, way="ring"),
        optimizer="muon",
    ),
    Composition(
        Case(
            tp=2,
            pp=2,
            zero=2,
            schedule=H,
            recompute="selective",
            precision="bf16",
            model_kind="experts",
            padded=True,
        ),
        Case(dp=2, cp=2, ep=2),
        task="kto",
    ),
    Composition(
        Case(tp=2, cp=2, sp=False, way="ring", tied=True, recompute="full", model_kind="softmax", ep=2),
        Case(pp=2, cp=2, way="heads", schedule=V, ep=2),
        optimizer="muon",
        task="dpo",
    ),
    Composition(
        Case(
            pp=2,
            cp=2,
            zero=0,
            way="heads",
            schedule=L,
            recompute="selective",
            model_kind="experts",
            padded=True,
        ),
        Case(pp=2, dp=2, schedule=V, ep=2),
        optimizer="muon",
        task="kto",
    ),
    Composition(
        Case(tp=2, pp=2, zero=0, schedule=L, tied=True, model_kind="experts", padded=True),
        Case(pp=2, cp=2, zero=1, way="ring", recompute="full"),
        task="kto",
        lora=True,
    ),
    Composition(
        Case(cp=4, tied=True, recompute="full", precision="bf16", model_kind="softmax", ep=2),
        Case(tp=4, sp=False, recompute="selective"),
        optimizer="muon",
        task="dpo",
    ),
    Composition(
        Case(dp=2, cp=2, zero=2, recompute="full", padded=True, uneven=True),
        Case(tp=2, cp=2, zero=1, way="heads", recompute="full"),
    ),
    Composition(
        Case(
            tp=2,
            pp=2,
            zero=0,
            schedule="afab",
            tied=True,
            recompute="full",
            model_kind="softmax",
            padded=True,
        ),
        Case(pp=2, cp=2, way="ring", schedule=V, recompute="full"),
        optimizer="muon",
        task="dpo",
    ),
    Composition(
        Case(tp=2, dp=2, zero=1, padded=True, uneven=True, **FP8_EXPERTS),
        Case(pp=2, dp=2, schedule=V, recompute="full", ep=2),
    ),
    Composition(
        Case(pp=2, cp=2, zero=2, way="ring", schedule="afab", tied=True, recompute="selective", **FP8),
        Case(pp=2, dp=2, zero=0, schedule=L),
        optimizer="muon",
        task="finetune",
    ),
    Composition(
        Case(tp=2, pp=2, sp=False, schedule=H, **FP8),
        Case(dp=4),
        optimizer="qk-clip",
        task="dpo",
    ),
    Composition(
        Case(cp=4, **FP8),
        Case(pp=2, cp=2, way="heads"),
        task="kto",
        lora=True,
    ),
    Composition(Case(dp=4, zero=2, precision="bf16", **FP8), Case(tp=4)),
]
