"""Which pairs of features meet in a case of a test that compares every layout with one process."""

from typing import NamedTuple

from tests import test_context_equivalence as context
from tests import test_equivalence as equivalence
from tests import test_finetuning_equivalence as finetuning
from tests import test_fp8_equivalence as fp8
from tests import test_lora_equivalence as lora
from tests import test_muon_equivalence as muon
from tests import test_preference_equivalence as preference
from tests.composition.compositions import Composition
from tests.composition.features import ALWAYS, Pair, features_of_case, pairs_of, pairs_within


class Evidence(NamedTuple):
    """A test, and what meets in its cases."""

    test: str
    pairs: set[Pair]


def evidence(compositions: list[Composition]) -> list[Evidence]:
    """In the order in which they are named on the page."""
    adam, of_muon = {"AdamW"}, {"Muon"}
    plain = equivalence.CASES + equivalence.CHUNK_CASES + equivalence.EXPERT_CASES + equivalence.NORM_CASES
    plain += equivalence.BF16_CASES
    with_context = context.CASES + context.EXPERT_CASES + context.BF16_CASES
    muons = muon.CASES + muon.EXPERT_CASES + muon.BF16_CASES
    tuned = {"SFT", "padding", "document masks", "uneven labels"} | adam
    features: dict[str, list[set[str]]] = {
        "test_equivalence.py": [features_of_case(case) | adam for case in plain],
        "test_context_equivalence.py": [features_of_case(case) | adam for case in with_context],
        "test_muon_equivalence.py": [
            *(features_of_case(case) | of_muon for case in muons),
            *(features_of_case(case) | of_muon | {"QK-clip"} for case in muon.CLIPPED),
        ],
        "test_lora_equivalence.py": [features_of_case(case) | adam | {"LoRA"} for case, _ in lora.CASES],
        "test_finetuning_equivalence.py": [
            features_of_case(one.case) | tuned | ({"packing"} if one.packing else set())
            for one in finetuning.TUNINGS
        ],
        "test_preference_equivalence.py": [
            features_of_case(case) - ALWAYS  # norms may be below the limit
            | adam
            | {"uneven labels", "DPO" if preference.CONFIGS[name].loss == "dpo" else "KTO"}
            for case, name in preference.CASES
            if preference.CONFIGS[name].loss != "simpo"
        ],
        "test_fp8_equivalence.py": [features_of_case(case) | adam for case in fp8.CASES],
    }
    found = [Evidence(test, set().union(*map(pairs_within, of_cases))) for test, of_cases in features.items()]
    return [*found, Evidence("composition/test_compositions.py", set().union(*map(pairs_of, compositions)))]
