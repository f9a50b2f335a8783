"""Write docs/recipes.md from the shipped runs: their commands, sizes, and memory on A100 nodes."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from megalite.config.deepspeed import DeepSpeedConfig, load_deepspeed
from megalite.config.load import load_run
from megalite.config.run import RunConfig
from megalite.error import run_command
from megalite.files import write_text
from megalite.model.flops import (
    ModelStateBytes,
    model_state_bytes_per_rank,
    num_active_parameters,
    num_parameters,
    parameters_of_fullest_stage,
)

ROOT = Path(__file__).parent.parent
DEFAULT_OUTPUT = ROOT / "docs" / "recipes.md"
GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Layout:
    """Where a run is trained: nodes of 8 GPUs, and what changes in it on GPUs of 40 GB.

    Its tensor and pipeline parallelism stand in its YAML, ZeRO and batch in its DeepSpeed JSON.
    """

    nodes: int
    on_40_gb: tuple[str, ...] = ()


LAYOUTS = {
    "lillm_39m": Layout(1),
    "lillm_39m_sft": Layout(1),
    "lillm_39m_dpo": Layout(1),
    "lillm_300m": Layout(1),
    "lightlm_ffn": Layout(1),
    "lightlm_attn": Layout(1),
    "lightlm_moe": Layout(1),
    "pretrain_460m": Layout(2),
    "tinyllama_1.1b": Layout(2),
    "llama2_7b": Layout(8, ("parallel.tp_size=2",)),
    "llama3_8b": Layout(8, ("parallel.tp_size=4",)),
    "moe_16b": Layout(8, ("parallel.pp_size=4",)),
    "llama3_70b": Layout(32, ("parallel.pp_size=8", "parallel.recompute=full")),
}

INTRODUCTION = """\
# Recipes

The runs of `configs/runs` that are made for A100 nodes of 8 GPUs. Each YAML says in its first comment what is
published, by whom, and what is not. `make demo` trains `demo.yaml`.

This page is written by `python tools/describe_recipes.py` from the files and the code.
"""

START = """\
## Start

After `data.train` comes the prefix of the token files ([data](data_format.md)), after `data.tokenizer` the
folder that goes into exports. `lillm_39m_sft` goes on with what `lillm_39m` wrote, `lillm_39m_dpo` with what
that wrote, on a file of conversations or pairs ([data](fine_tuning.md)). On GPUs of 40 GB, add what the last
table says is changed. [Slurm](slurm.md) tells the rest.
"""

SIZE = """\
## Size

"Active" are the parameters that one token passes through; "per step" and "in all" are in tokens.

| run | parameters | active | per step | steps | in all |
|---|---|---|---|---|---|
"""

MEMORY = """\
## Memory of one GPU

Between steps a GPU holds its share of weights, gradients and optimizer: the model's state, as
`model_state_bytes_per_rank` counts it for the fullest stage. In a step, ZeRO-3 with
`parallel.parameter_gathering=step` also holds the weights of its stage and tensor-parallel slice whole, in
bf16; with ZeRO-1 they are in the state. Both are computed, not measured. Activations, communication buffers
and the allocator's gaps come on top, and grow with the micro batch; what is left of 80 or 40 GiB is for them.

| run | GPUs | changed | tensor x pipeline x data | ZeRO | state, GiB | whole weights, GiB | left, GiB |
|---|---|---|---|---|---|---|---|
"""

REACHED = """
## Reached here

LightLM's two kinds at the size of `make laptop` (`laptop_2m.yaml`, 1,500 steps of 1,024 tokens of English, on
2 CPU processes): dense, and as its mixture of experts, where an MLP of width 512 becomes a shared expert and
one routed expert per token, of width 256 each. So all have 2.0 million active parameters. Losses are in nats
per token, the first a mean over the last 20 steps. The largest violation is that of the last steps.

| model | parameters | loss | validation loss | largest violation |
|---|---|---|---|---|
| dense | 2,016,960 | 3.92 | 3.99 | |
| 1 of 2 experts, LightLM's "2+1" | 2,608,320 | 3.89 | 3.96 | 0.3 |
| 1 of 8 experts | 6,151,872 | 3.93 | 4.00 | 1.8 |

```
make laptop    # the dense one, and the data of all
deepspeed --num_gpus 2 launchers/pretrain.py --deepspeed_config configs/deepspeed/laptop.json \\
          --config configs/runs/laptop_2m.yaml data.train=runs/laptop/corpus/prose_text_document \\
          data.tokenizer=runs/laptop/tokenizer output_dir=runs/experts_2 model.n_routed_experts=2 \\
          model.num_experts_per_tok=1 model.n_shared_experts=1 model.moe_intermediate_size=256 \\
          model.norm_topk_prob=false balancing.update_rate=0.01
```

With 1,024 tokens a step the counts of eight experts are mostly chance, and the sign rule follows it: this
run was too small to balance them, and more experts gained nothing. On steps of 32,768 tokens both rules come
below 5 % (`tests/model/test_balancing.py`).

At their true sizes `lightlm_ffn`, `lightlm_attn` and `lightlm_moe` take steps on 2 CPU processes under ZeRO-3
in fp32, on samples of 64 tokens, with at most 4.6 GiB per process; `lightlm_moe` with `parallel.ep_size=2`
with 3.0.
"""


@dataclass(frozen=True)
class Recipe:
    """One run on one kind of GPU."""

    name: str
    gpu_gib: int
    num_gpus: int
    overrides: tuple[str, ...]
    run: RunConfig
    deepspeed: DeepSpeedConfig

    @property
    def dp_size(self) -> int:
        return self.run.dp_size_of(self.num_gpus)

    def model_state(self) -> ModelStateBytes:
        """Bytes of the model that one GPU keeps between steps."""
        return model_state_bytes_per_rank(
            self.run.model,
            tp_size=self.run.parallel.tp_size,
            pp_size=self.run.parallel.pp_size,
            dp_size=self.dp_size,
            zero_stage=self.deepspeed.zero_stage,
            precision=self.deepspeed.precision,
            grad_accum_dtype=self.deepspeed.grad_accum_dtype,
        )

    def whole_weights(self) -> int:
        """Bytes of the bf16 weights that ZeRO-3 gathers for a step; other stages have them in the state."""
        model, parallel = self.run.model, self.run.parallel
        if self.deepspeed.zero_stage < 3 or parallel.parameter_gathering != "step":
            return 0
        return 2 * parameters_of_fullest_stage(model, parallel.tp_size, parallel.pp_size)


def recipe_of(name: str, gpu_gib: int) -> Recipe:
    """The run of that name, laid out for such GPUs."""
    layout = LAYOUTS[name]
    overrides = layout.on_40_gb if gpu_gib == 40 else ()
    run = _with_model(load_run(_file_of(name), list(overrides)))
    deepspeed = load_deepspeed(str(ROOT / f"configs/deepspeed/{name}.json"))
    return Recipe(name, gpu_gib, layout.nodes * GPUS_PER_NODE, overrides, run, deepspeed)


def _file_of(name: str) -> str:
    return str(ROOT / f"configs/runs/{name}.yaml")


def _with_model(run: RunConfig) -> RunConfig:
    """A run that goes on with another, with the model of that; each writes to a folder of its name."""
    if run.checkpoint.start_from is None:
        return run
    start = _with_model(load_run(_file_of(Path(run.checkpoint.start_from).name), []))
    return run.model_copy(update={"model": start.model})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    page = "file to write (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help=page)
    arguments = parser.parse_args(argv)
    return run_command(lambda: write_page(arguments.output))


def write_page(output: Path) -> None:
    """Write the page to `output`."""
    write_text(output, describe())
    print(f"wrote {output}")


def describe() -> str:
    """The whole page, in Markdown."""
    recipes = all_recipes()
    on_80_gb = [recipe for recipe in recipes if recipe.gpu_gib == 80]
    commands = "".join(map(_command, on_80_gb))
    sizes, memory = "".join(map(_size, on_80_gb)), "".join(map(_memory, recipes))
    return f"{INTRODUCTION}\n{START}\n```\n{commands}```\n\n{SIZE}{sizes}\n{MEMORY}{memory}{REACHED}"


def all_recipes() -> list[Recipe]:
    """Every run, on GPUs of 80 GB and then of 40."""
    return [recipe_of(name, gpu_gib) for name in LAYOUTS for gpu_gib in (80, 40)]


def _command(recipe: Recipe) -> str:
    options = f"--job-name={recipe.name} --nodes={recipe.num_gpus // GPUS_PER_NODE}"
    data = "data.train=PREFIX data.tokenizer=FOLDER" if recipe.run.task == "pretrain" else "data.train=FILE"
    return f"sbatch {options} slurm/pretrain.sh {recipe.name} {data}\n"


def _size(recipe: Recipe) -> str:
    steps = recipe.run.schedule.num_steps
    rows = recipe.deepspeed.train_batch_size * (2 if recipe.run.task == "prefer" else 1)  # two answers
    tokens = rows * recipe.run.data.seq_length
    model = recipe.run.model
    counts = [num_parameters(model), num_active_parameters(model), tokens, steps, tokens * steps]
    return _row([f"`{recipe.name}`", *(f"{count:,}" for count in counts)])


def _memory(recipe: Recipe) -> str:
    parallel = recipe.run.parallel
    state, whole = recipe.model_state().total, recipe.whole_weights()
    left = recipe.gpu_gib * 2**30 - state - whole
    return _row(
        [
            f"`{recipe.name}`",
            f"{recipe.num_gpus} x {recipe.gpu_gib} GB",
            " ".join(f"`{override}`" for override in recipe.overrides),
            f"{parallel.tp_size} x {parallel.pp_size} x {recipe.dp_size}",
            str(recipe.deepspeed.zero_stage),
            *(f"{size / 2**30:.1f}" for size in (state, whole, left)),
        ]
    )


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    sys.exit(main())
