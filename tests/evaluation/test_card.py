"""The model card of an export says what is known of the model, and nothing else."""

import json

import pytest

from megalite.checkpoint.format import MANIFEST
from megalite.checkpoint.tensor_file import hash_file
from megalite.checkpoint.weights import Weights
from megalite.config.load import dump_run
from megalite.evaluation.card import format_card
from megalite.evaluation.record import Evaluation, EvaluationError, Measurement
from tests.checkpoint.llamas import random_llama, save_llama, tensors_of, tiny_run
from tests.checkpoint.worlds import cut_all, even_cut, save_world
from tools import convert_to_hf

STATE = {
    "step": 10,
    "consumed_samples": 80,
    "consumed_tokens": 10240,
    "optimizer_steps": 10,
    "versions": {"megalite": "unknown", "torch": "2.13.0"},
    "data": {
        "train": [
            {"prefix": "/secret/place/corpus", "weight": 0.5, "bin_bytes": 123456, "idx_bytes": 99,
             "idx_sha256": "ab" * 32, "sequences": [0, 9], "seq_length": 128, "epochs": [2, 1], "seed": 1}
        ]
    },
}  # fmt: skip
ROWS = [
    {"step": 5, "loss": 5.5, "validation_loss": 5.25},
    {"step": 10, "loss": 4.125},
    {"step": 11, "loss": 3.0, "validation_loss": 2.0},
]


@pytest.fixture
def run_folder(tmp_path):
    return tmp_path / "run"


def save(run_folder, state=None, variant="plain") -> Weights:
    run = tiny_run(variant)
    llama = random_llama(run.model)
    root = run_folder / "checkpoints"
    if state is None:
        return Weights(save_llama(root, llama, run), run.model)
    pieces = cut_all(tensors_of(llama), lambda name, full: even_cut(None))
    checkpoint = save_world(root, state["step"], pieces, state, files={"config.yaml": dump_run(run)})
    return Weights(checkpoint, run.model)


def record(weights, name="evaluation.json", manifest=None, value=0.4321):
    path = weights.checkpoint.parent.parent / name
    sha256 = manifest or hash_file(weights.checkpoint / MANIFEST)
    origin = {"path": str(weights.checkpoint), "step": 10, "manifest_sha256": sha256}
    rows = [Measurement("arc_easy", "acc", value, 0.01, 25, 100)]
    Evaluation(origin, {"dtype": "bfloat16", "limit": None}, {"lm_eval": "0.4.13"}, rows).save(path)


def headings(card: str) -> list[str]:
    return [line[3:] for line in card.splitlines() if line.startswith("## ")]


def test_a_checkpoint_that_knows_little_gives_a_short_card(run_folder):
    weights = save(run_folder)
    card = format_card(weights)
    num_parameters = sum(p.numel() for p in random_llama(weights.model).parameters())
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"\n# A LlamaForCausalLM of {num_parameters:,} parameters\n" in card
    assert "- context in tokens: 64\n" in card and "- number format: float32\n" in card
    assert headings(card) == ["Model", "Training"]
    assert "- optimizer steps: 10\n" in card and "- tokens:" not in card and "batch" not in card
    assert "None" not in card and "unknown" not in card and str(run_folder.parent) not in card


def test_what_the_checkpoint_knows_is_told_without_folders(run_folder):
    card = format_card(save(run_folder, STATE))
    assert headings(card) == ["Model", "Training", "Data", "Versions in training"]
    assert "- tokens: 10,240\n" in card and "- sequences in a batch: 8\n" in card
    assert f"| corpus | 0.5 | 123,456 | 3 | {'ab' * 32} |" in card
    assert "- torch: 2.13.0\n" in card and "megalite: " not in card
    assert "secret" not in card


def test_imported_weights_are_not_said_to_be_trained_by_the_settings_of_a_run(run_folder):
    card = format_card(save(run_folder, {"step": 0, "consumed_samples": 0, "consumed_tokens": 0}))
    assert "- optimizer steps: 0\n" in card and "learning rate" not in card


def test_losses_are_the_last_ones_up_to_the_step_of_the_checkpoint(run_folder):
    weights = save(run_folder, STATE)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS) + '{"step": 1'
    (run_folder / "metrics.jsonl").write_text(lines)
    card = format_card(weights)
    assert "- training: 4.1250 nats per token at step 10\n" in card
    assert "- validation: 5.2500 nats per token at step 5\n" in card


def test_evaluations_of_this_checkpoint_are_shown_and_others_are_not(run_folder):
    weights = save(run_folder, STATE)
    record(weights)
    record(weights, "evaluation-2.json", value=0.1234)
    record(weights, "evaluation-other.json", manifest="of another checkpoint", value=0.9999)
    card = format_card(weights)
    assert "| arc_easy | 25       | acc    | 0.4321 | 0.0100         | 100     |" in card
    assert "0.1234" in card and "0.9999" not in card
    assert "Measured with dtype bfloat16, lm_eval 0.4.13." in card


def test_a_record_that_is_none_is_one_line(run_folder):
    weights = save(run_folder, STATE)
    (run_folder / "evaluation.json").write_text("{}")
    with pytest.raises(EvaluationError, match="is not a record of"):
        format_card(weights)


def test_experts_are_counted_as_a_token_uses_them(run_folder):
    card = format_card(save(run_folder, STATE, "experts"))
    assert "# A Glm4MoeForCausalLM of " in card and "- parameters that a token uses: " in card


def test_the_export_has_the_card(tmp_path, run_folder):
    weights = save(run_folder, STATE)
    record(weights)
    where = ["--checkpoint", str(run_folder / "checkpoints"), "--output", str(tmp_path / "hf")]
    assert convert_to_hf.main([*where, "--dtype", "float32"]) == 0
    assert (tmp_path / "hf" / "README.md").read_text(encoding="utf-8") == format_card(weights)
