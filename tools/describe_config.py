"""Write docs/configuration.md from the configuration's own types and descriptions."""

import argparse
import json
import sys
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from megalite.config.batch import BatchSizes
from megalite.config.deepspeed import OWNED_BY_RUN, DeepSpeedConfig
from megalite.config.load import section_of
from megalite.config.run import RunConfig
from megalite.config.section import Section
from megalite.error import run_command
from megalite.files import write_text

DEFAULT_OUTPUT = Path(__file__).parent.parent / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

A run is stated in two files, and each fact has one home:

- the **run** (`--config FILE.yaml`, or the defaults below) says what is trained and how;
- the **DeepSpeed JSON** (`--deepspeed_config FILE.json`) says batch sizes, precision, ZeRO and clipping.

A fact stated in both, an unknown key, or a value of another kind is refused in one line that names the place.
Any key of the run can be changed on the command line, its value written as in YAML:

    deepspeed launchers/pretrain.py --deepspeed_config configs/deepspeed/zero3.json \\
              --config configs/runs/pretrain_460m.yaml parallel.tp_size=2 optimizer.learning_rate=3e-4

The resolved run is saved as `config.yaml` in its output folder, and starts the same run again.

This page is written by `python tools/describe_config.py` from the code.
"""

DERIVED = """\
A batch is micro batch x accumulation steps x data-parallel ranks. Two of the three sizes give the third; all
three must agree; `train_batch_size` or `train_micro_batch_size_per_gpu` alone means one micro batch per step.
That is how DeepSpeed derives them.

`"auto"`, as Hugging Face's users write it, is taken where something decides the value:

| DeepSpeed JSON | `"auto"` means |
|---|---|
| the three batch sizes | left out: it follows from the others |
| `gradient_clipping` | 1.0, as where it is left out |
| `zero_optimization.reduce_bucket_size` | hidden_size x hidden_size, in elements |
| `zero_optimization.stage3_prefetch_bucket_size` | 0.9 x hidden_size x hidden_size, in elements |
| `zero_optimization.stage3_param_persistence_threshold` | 10 x hidden_size, in elements |
| `data_types.keep_in_fp32_modules` | left out: DeepSpeed's own default |

Anywhere else, `bf16.enabled` and `zero_optimization.stage` included, nothing decides it, and it is refused in
one line. The run's folder and its checkpoints keep a `deepspeed.json` with the numbers.

"""


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
    sections = [(name, section_of(field)) for name, field in RunConfig.model_fields.items()]
    top_level = [name for name, section in sections if section is None]
    parts = [INTRODUCTION, "## The run\n", "### Top level\n\n" + _table(RunConfig, top_level)]
    parts += [_section(name, section) for name, section in sections if section is not None]
    parts += ["## The DeepSpeed JSON\n\n" + _deepspeed()]
    return "\n".join(parts)


def _section(key: str, section: type[Section]) -> str:
    own = [name for name, field in section.model_fields.items() if section_of(field) is not field.annotation]
    text = f"### `{key}`\n\n{_summary(section)}\n\n{_table(section, own)}"
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if inner is not None:
            text += "\n" + _section(f"{key}.{name}", inner)
    return text


def _deepspeed() -> str:
    batch = list(BatchSizes.model_fields)
    names = [name for name in DeepSpeedConfig.model_fields if name not in ("precision", "raw", *batch)]
    refused = "\n".join(f"| `{key}` | `{owner}` |" for key, owner in OWNED_BY_RUN.items())
    return (
        f"megalite reads these keys, and hands the whole to DeepSpeed:\n\n{_table(BatchSizes, batch)}"
        f"{_rows(DeepSpeedConfig, names)}\n"
        "| `bf16.enabled`, `fp16.enabled` | true or false | `false` | Number format of the weights in "
        f"forward and backward; neither means fp32. Not with ZeRO stage 0. |\n\n{DERIVED}"
        f"These are refused, because the run states them:\n\n| DeepSpeed JSON | run |\n|---|---|\n{refused}\n"
    )


def _table(section: type[Section], names: list[str]) -> str:
    return f"| key | value | default | meaning |\n|---|---|---|---|\n{_rows(section, names)}\n"


def _rows(section: type[Section], names: list[str]) -> str:
    return "\n".join(_row(name, section.model_fields[name]) for name in names)


def _row(name: str, field: FieldInfo) -> str:
    alias = field.validation_alias
    key = ".".join(str(part) for part in alias.path) if hasattr(alias, "path") else name  # type: ignore[union-attr]
    meaning = (field.description or "").replace("|", "\\|")
    return f"| `{key}` | {_kind(field.annotation)} | {_default(field)} | {meaning} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return f"`{field.default if isinstance(field.default, str) else json.dumps(field.default)}`"


def _kind(annotation: Any) -> str:
    """A type in a reader's words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{str(choice).lower()}`" for choice in arguments)
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if arguments:
        return " or ".join(_kind(argument) for argument in arguments)
    words = {int: "whole number", float: "number", bool: "true or false", str: "text", NoneType: "null"}
    return words.get(annotation, "section")


def _summary(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split())


if __name__ == "__main__":
    sys.exit(main())
