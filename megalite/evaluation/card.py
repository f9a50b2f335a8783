"""The model card of an export: where the model came from, as far as its checkpoint and its run know."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megalite.checkpoint.format import MANIFEST
from megalite.checkpoint.hf_config import hf_config
from megalite.checkpoint.load import read_config, read_state
from megalite.checkpoint.tensor_file import hash_file
from megalite.checkpoint.weights import Weights
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from megalite.evaluation.record import Evaluation, format_table
from megalite.evaluation.subject import run_folder_of
from megalite.measure.metrics import METRICS_FILE
from megalite.model.flops import num_active_parameters, num_parameters

CARD_FILE = "README.md"
RECORDS = "evaluation*.json"  # of tools/evaluate.py, in the run's folder
HEADER = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- megalite\n---\n"
Facts = Mapping[str, Any]


def format_card(weights: Weights) -> str:
    """The README.md of an export, in Markdown. What is not known is left out; folders are never named.

    Raises EvaluationError when a record in the run's folder cannot be read.
    """
    run, state = read_config(weights.checkpoint), read_state(weights.checkpoint)
    folder = run_folder_of(weights.checkpoint)
    sections = {
        "Model": _facts(_describe_model(weights)),
        "Training": _facts(_describe_training(run, state)),
        "Data": "\n\n".join(_describe_data(state.get("data", {}))),
        "Loss": _facts(_last_losses(folder, state["step"]) if folder else {}),
        "Evaluation": "\n\n".join(_evaluations(folder, weights.checkpoint) if folder else []),
        "Versions in training": _facts(_known_versions(state)),
    }
    kind = hf_config(weights.model, weights.dtype)["architectures"][0]
    title = f"# A {kind} of {num_parameters(weights.model):,} parameters"
    told = [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n\n".join([HEADER + "\n" + title, *told]) + "\n"


def _facts(facts: Facts) -> str:
    """A list of what is known."""
    return "\n".join(f"- {name}: {_text(value)}" for name, value in facts.items() if value is not None)


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _describe_model(weights: Weights) -> Facts:
    model: ModelConfig = weights.model
    active = num_active_parameters(model)
    return {
        "parameters": num_parameters(model),
        "parameters that a token uses": active if model.n_routed_experts else None,
        "layers": model.num_hidden_layers,
        "hidden size": model.hidden_size,
        "attention heads": f"{model.num_attention_heads}, {model.num_key_value_heads} for keys and values",
        "vocabulary": model.vocab_size,
        "context in tokens": model.max_position_embeddings,
        "number format": weights.dtype,
    }


def _describe_training(run: RunConfig, state: Facts) -> Facts:
    """Nothing of a run where no step was taken: the weights were imported."""
    step = state["step"]
    if not step:
        return {"optimizer steps": 0}
    samples = state.get("consumed_samples")
    optimizer, schedule = run.optimizer, run.schedule
    return {
        "optimizer steps": step,
        "steps that were planned": schedule.num_steps,
        "tokens": state.get("consumed_tokens"),
        "sequence length in tokens": run.data.seq_length,
        "sequences in a batch": samples // step if samples else None,
        "optimizer": f"{optimizer.name}, weight decay {optimizer.weight_decay:g}",
        "highest learning rate": f"{optimizer.learning_rate:g}",
        "schedule": f"{schedule.decay}, {schedule.warmup_steps:,} steps of warm-up",
        "began with": "the weights of another checkpoint" if run.checkpoint.start_from else None,
        "seed": f"{run.seed}",
    }


def _describe_data(data: Mapping[str, list[Facts]]) -> Iterator[str]:
    """The files of each part, by what tells them apart from others."""
    for part, files in data.items():
        rows = [
            f"| {Path(file['prefix']).name} | {'' if file['weight'] is None else file['weight']} "
            f"| {file['bin_bytes']:,} | {file.get('passes') or sum(file['epochs'])} "
            f"| {file['idx_sha256']} |"
            for file in files
        ]
        head = f"| {part} | weight | bytes of ids | passes at most | SHA-256 of the index |"
        yield "\n".join([head, "|---|---|---|---|---|", *rows])


def _last_losses(folder: Path, step: int) -> Facts:
    """The last ones that were recorded up to a step."""
    last: dict[str, tuple[float, int]] = {}
    for row in _read_rows(folder / METRICS_FILE):
        if row["step"] <= step:
            last |= {name: (row[name], row["step"]) for name in ("loss", "validation_loss") if name in row}
    names = {"loss": "training", "validation_loss": "validation"}
    return {names[name]: f"{loss:.4f} nats per token at step {at:,}" for name, (loss, at) in last.items()}


def _read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The whole rows of a run's record; none where there is no such file."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short by a crash
        if isinstance(row, dict) and "step" in row:
            yield row


def _evaluations(folder: Path, checkpoint: Path) -> Iterator[str]:
    """What was measured of exactly this checkpoint."""
    manifest = hash_file(checkpoint / MANIFEST)
    for file in sorted(folder.glob(RECORDS)):
        found = Evaluation.read(file)
        if found.origin.get("manifest_sha256") != manifest:
            continue
        shown = {k: v for k, v in found.settings.items() if k in ("dtype", "context", "limit") and v}
        terms = [f"{name} {value}" for name, value in {**shown, **found.versions}.items()]
        yield f"{format_table(found.measurements)}\n\nMeasured with {', '.join(terms)}."


def _known_versions(state: Facts) -> Facts:
    return {name: version for name, version in state.get("versions", {}).items() if version != "unknown"}
