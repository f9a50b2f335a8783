"""A run's checkpoints as a list, and one of them as a page."""

from collections.abc import Iterator, Sequence

from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from megalite.inspection.blocks import kinds_of
from megalite.inspection.table import Facts, aligned, bytes_in_words
from megalite.measure.progress import seconds_in_words
from megalite.model.flops import num_active_parameters, num_parameters

COUNTS = {"consumed_samples": "samples", "consumed_tokens": "tokens", "optimizer_steps": "optimizer steps"}
LOSSES = {"loss": "loss", "validation_loss": "validation loss"}


def run_in_words(run: Facts, now_seconds: float) -> Iterator[str]:
    """What `facts_of_run` found, a line for each checkpoint. now_seconds: since 1970."""
    title = ["step", "size", "age", "tokens", *LOSSES.values(), ""]
    yield from aligned(
        [title, *(_row(checkpoint, run, now_seconds) for checkpoint in run["checkpoints"])], "rrrrrrl"
    )
    yield ""
    yield from (f"unfinished, never read: {folder}" for folder in run["unfinished"])
    yield f"newest valid: {run['newest_valid'] or 'none'}"
    if not run["verified"]:
        yield "of the files of tensors the sizes were looked at; --verify reads them too"


def _row(checkpoint: Facts, run: Facts, now_seconds: float) -> list[str]:
    sound = "verified" if run["verified"] else "complete"
    newest = ", newest valid" if checkpoint["folder"] == run["newest_valid"] else ""
    tokens, losses = checkpoint["consumed_tokens"], [checkpoint[name] for name in LOSSES]
    return [
        f"{checkpoint['step']:,}",
        bytes_in_words(checkpoint["size_bytes"]),
        _age(checkpoint, now_seconds),
        "-" if tokens is None else f"{tokens:,}",
        *("-" if loss is None else f"{loss:.4f}" for loss in losses),
        _damage(checkpoint["damage"] + checkpoint["base_damage"]) or sound + newest,
    ]


def _age(checkpoint: Facts, now_seconds: float) -> str:
    return seconds_in_words(max(0.0, now_seconds - checkpoint["saved_at_seconds"]))


def _damage(lines: Sequence[str]) -> str:
    return f"DAMAGED: {'; '.join(lines)}" if lines else ""


def checkpoint_in_words(facts: Facts, now_seconds: float) -> Iterator[str]:
    """What `facts_of_checkpoint` found: what it is, then what it holds. now_seconds: since 1970."""
    yield facts["folder"]
    yield ""
    yield from aligned(list(_lines(facts, now_seconds)), "ll")
    tensors = facts.get("tensors", [])
    if tensors:
        yield ""
        yield from aligned(list(_kinds(tensors)), "lrrrl")
    if any("norm" in tensor for tensor in tensors):
        yield ""
        yield from aligned(list(_tensors(tensors)), "lllrrrr")


def _lines(facts: Facts, now_seconds: float) -> Iterator[tuple[str, str]]:
    """A name and what is said of it."""
    losses = [f"{text} {facts[name]:.4f}" for name, text in LOSSES.items() if facts[name] is not None]
    yield "saved", ", ".join([f"{_age(facts, now_seconds)} ago, after step {facts['step']:,}", *losses])
    yield "holds", _damage(facts["damage"]) or _files(facts)
    state = facts.get("state", {})
    counts = [f"{state[name]:,} {unit}" for name, unit in COUNTS.items() if name in state]
    if counts:
        yield "consumed", ", ".join(counts)
    if "imported_from" in state:
        yield "imported", f"from {state['imported_from']}"
    if "config" in facts:
        yield "layout", _layout(facts["layout"], facts["num_ranks"])
        yield "model", _model(RunConfig.model_validate(facts["config"]).model)
    if "base" in facts:
        yield "adapters", f"of {facts['base']['folder']}"
        yield "base", _damage(facts["base_damage"]) or "as it was when they were trained on it"
        yield "", f"manifest.json then had sha256 {facts['base']['manifest_sha256']}"
    for part, sources in state.get("data", {}).items():
        yield "data", f"{part}: {', '.join(map(_source, sources))}"
    if "versions" in state:
        yield "versions", ", ".join(f"{name} {version}" for name, version in state["versions"].items())


def _files(facts: Facts) -> str:
    checked = (
        "each as its sha256 says"
        if facts["verified"]
        else "those of tensors in their sizes; --verify reads them too"
    )
    return f"{len(facts['files']) + 1} files, {bytes_in_words(facts['size_bytes'])}: {checked}"


def _layout(layout: Facts, num_ranks: int) -> str:
    ranks = f"{num_ranks} rank{'s' * (num_ranks > 1)}"
    if "zero_stage" not in layout:
        return f"written by {ranks}, without DeepSpeed"
    context = f" x context {layout['cp_size']}" if layout["cp_size"] > 1 else ""
    sizes = f"tensor {layout['tp_size']} x pipeline {layout['pp_size']}{context} x data {layout['dp_size']}"
    experts = f" (experts over {layout['ep_size']} of these)" if layout["ep_size"] > 1 else ""
    sequence = ", sequence parallel" if layout["sequence_parallel"] else ""
    return f"{ranks} = {sizes}{experts}{sequence}; ZeRO-{layout['zero_stage']}, {layout['precision']}"


def _model(model: ModelConfig) -> str:
    active, experts = "", ""
    if model.n_routed_experts:
        active = f" ({num_active_parameters(model):,} active per token)"
        experts = f", {model.n_routed_experts} experts of which a token takes {model.num_experts_per_tok}"
    return (
        f"{num_parameters(model):,} parameters{active}: {model.num_hidden_layers} layers of width "
        f"{model.hidden_size:,}, {model.num_attention_heads} query and {model.num_key_value_heads} key/value "
        f"heads{experts}, vocabulary {model.vocab_size:,}{', tied embeddings' * model.tie_word_embeddings}"
    )


def _source(source: Facts) -> str:
    weight = source.get("weight")
    return str(source["prefix"]) + ("" if weight is None else f" (weight {weight:g})")


def _kinds(tensors: Sequence[Facts]) -> Iterator[list[str]]:
    """A row for each kind, and the sum."""
    yield ["kind", "tensors", "elements", "bytes", "stored as"]
    kinds = kinds_of((tensor["kind"], tensor["name"]) for tensor in tensors)
    groups = {kind: [tensor for tensor in tensors if tensor["kind"] == kind] for kind in kinds}
    for name, group in [*groups.items(), ("all", tensors)]:
        sizes = [tensor["num_bytes"] for tensor in group]
        num_bytes = "-" if None in sizes else bytes_in_words(sum(sizes))
        num_elements = sum(tensor["num_elements"] for tensor in group)
        dtypes = sorted({dtype for tensor in group for dtype in tensor["dtypes"]})
        yield [name, f"{len(group):,}", f"{num_elements:,}", num_bytes, ", ".join(dtypes)]


def _tensors(tensors: Sequence[Facts]) -> Iterator[list[str]]:
    yield ["kind", "name", "shape", "norm", "min", "max", "not finite"]
    for tensor in tensors:
        numbers = [tensor["norm"], tensor["minimum"], tensor["maximum"]]
        cells = ["-" if number is None else f"{number:.4g}" for number in numbers]
        yield [tensor["kind"], tensor["name"], str(tensor["shape"]), *cells, f"{tensor['num_nonfinite']:,}"]
