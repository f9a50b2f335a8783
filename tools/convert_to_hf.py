"""Turn a megalite checkpoint into a Hugging Face folder: Llama, Qwen, Glm4Moe, or an adapter."""

import argparse
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.hf import export
from megalite.checkpoint.load import PLACES, newest_checkpoint, read_config, require_checkpoint
from megalite.checkpoint.peft_folder import export_adapter
from megalite.checkpoint.proof import prove
from megalite.checkpoint.verification import verify_export
from megalite.checkpoint.weights import DTYPES, Weights
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from megalite.error import run_command
from megalite.evaluation.card import CARD_FILE, format_card
from megalite.files import write_text
from megalite.model.flops import num_parameters
from megalite.tokenizer.error import TokenizerError
from megalite.tokenizer.load import load_tokenizer
from megalite.tokenizer.readback import find_misreading
from megalite.tokenizer.template import open_template
from megalite.tokenizer.tokenizer import Tokenizer

EPILOG = """\
The folder loads with AutoModelForCausalLM and AutoTokenizer of transformers 4 and 5. No GPU is needed, and
the checkpoint may come from any number of processes. Memory: two tensors and 0.5 GB; the comparison with
transformers at the end holds the model twice, in float32.

A checkpoint of adapters is exported merged into its base, or with --adapter alone, as PEFT loads it.

examples:
  python tools/convert_to_hf.py --checkpoint runs/default/checkpoints --output exported
  python tools/convert_to_hf.py --checkpoint runs/tuned --output adapter --adapter
"""
Result = TypeVar("Result")
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.adapter and arguments.verify:
        parser.error("--verify compares whole models: leave out --adapter")
    return run_command(lambda: convert(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    where = f"{PLACES}; of several the newest valid one"
    add("--checkpoint", type=Path, required=True, help=where)
    add("--output", type=Path, required=True, help="folder to write; must not exist, or be empty")
    alone = "write the adapter alone, a folder for PeftModel.from_pretrained (default: merged)"
    add("--adapter", action="store_true", help=alone)
    dtype = "of the weights (default: bfloat16, of an adapter float32)"
    add("--dtype", choices=DTYPES, help=dtype)
    size = "largest file: 500MB, 5GB, 2GiB (default: %(default)s)"
    add("--max-shard-size", type=parse_bytes, default="5GB", help=size)
    tokenizer = "folder, file, 'bytes', or 'none' for no tokenizer (default: the run's data.tokenizer)"
    add("--tokenizer", help=tokenizer)
    proof = "compare all weights and some logits with transformers' (default: where memory is enough)"
    add("--verify", action=argparse.BooleanOptionalAction, help=proof)
    return parser


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 5GB (decimal) or 2GiB (binary)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.upper())
    size_bytes = int(float(match[1]) * UNITS[match[2] or ""]) if match else 0
    if not size_bytes:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write it like 500MB, 5GB or 2GiB")
    return size_bytes


class DamagedError(CheckpointError):
    """The files that are exported do not match their checksums."""


def convert(arguments: argparse.Namespace) -> int:
    """Export, and verify if asked to, or if it fits and nothing was said; 0 when all is well."""
    if arguments.adapter:
        print(export_valid(arguments, export_one_adapter))
        return 0
    weights = export_valid(arguments, export_one)
    num_elements = num_parameters(weights.model)
    print(f"wrote {num_elements:,} parameters of {weights.checkpoint} to {arguments.output}")
    about = f"{arguments.output} does not agree with {weights.checkpoint}"
    return prove(lambda: verify_export(weights, arguments.output), weights.model, arguments.verify, about)


def export_valid(arguments: argparse.Namespace, write: Callable[..., Result]) -> Result:
    """Export the newest valid checkpoint as `write` does; what that returns.

    The newest is exported while its checksums are computed: its files are read once. The export gets its name
    when they match. Where they do not, it vanishes, and that of an older one is made.
    """
    print(f"checking the files of {arguments.checkpoint}", file=sys.stderr)
    with ThreadPoolExecutor(1) as beside:
        report = partial(print, file=sys.stderr)
        valid = beside.submit(require_checkpoint, arguments.checkpoint, report)
        newest = newest_checkpoint(arguments.checkpoint) or valid.result()

        def confirm() -> None:
            if valid.result() != newest:
                raise DamagedError(f"{newest} is damaged")

        try:
            return write(newest, arguments, confirm)
        except Exception:
            if valid.result() == newest:
                raise
        return write(valid.result(), arguments)


def export_one(
    checkpoint: Path, arguments: argparse.Namespace, confirm: Callable[[], None] = lambda: None
) -> Weights:
    """Export a checkpoint, which `confirm` may still refuse when all is written."""
    run = read_config(checkpoint)
    tokenizer = open_tokenizer(arguments.tokenizer or run.data.tokenizer, run.model)
    template = read_chat_template(run, tokenizer)
    dtype = arguments.dtype or "bfloat16"
    weights = Weights(checkpoint, with_end_of_text(run.model, tokenizer), dtype)
    card = format_card(weights)

    def add_files(folder: Path) -> None:
        write_text(folder / CARD_FILE, card)
        save_tokenizer(tokenizer, template, run.model, folder)
        confirm()

    with tqdm(total=weights.size_bytes, unit="B", unit_scale=True, desc="writing") as bar:
        export(
            weights,
            arguments.output,
            max_shard_bytes=arguments.max_shard_size,
            add_files=add_files,
            progress=bar.update,
        )
    if tokenizer is not None and (misreading := find_misreading(arguments.output, tokenizer)):
        print(f"warning: {misreading}", file=sys.stderr)
    return weights


def export_one_adapter(
    checkpoint: Path, arguments: argparse.Namespace, confirm: Callable[[], None] = lambda: None
) -> str:
    """Export a checkpoint's adapter, as `export_one` does a model; what was written, in words."""
    run = read_config(checkpoint)
    tokenizer = open_tokenizer(arguments.tokenizer or run.data.tokenizer, run.model)
    template = read_chat_template(run, tokenizer)

    def add_files(folder: Path) -> None:
        save_tokenizer(tokenizer, template, run.model, folder)
        confirm()

    dtype = arguments.dtype or "float32"
    num_elements = export_adapter(checkpoint, arguments.output, dtype, add_files=add_files)
    return f"wrote an adapter of {num_elements:,} parameters of {checkpoint} to {arguments.output}"


def open_tokenizer(name: str | None, model: ModelConfig) -> Tokenizer | None:
    """The tokenizer that goes into the export. TokenizerError when it has ids that the model has not."""
    if name is None or name == "none":
        return None
    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size > model.vocab_size:
        raise TokenizerError(
            f"tokenizer {name} has {tokenizer.vocab_size} ids and the model {model.vocab_size}: "
            "name the one that it was trained with (--tokenizer)"
        )
    return tokenizer


def read_chat_template(run: RunConfig, tokenizer: Tokenizer | None) -> str | None:
    """The template that the run was trained with, for its tokenizer; None for the tokenizer's own."""
    if tokenizer is None or run.data.chat_template is None:
        return None
    try:
        template = open_template(tokenizer, run.data.chat_template)
    except TokenizerError as error:
        print(f"warning: without the run's chat template: {error}", file=sys.stderr)
        return None
    return template.source if template else None


def save_tokenizer(
    tokenizer: Tokenizer | None, chat_template: str | None, model: ModelConfig, folder: Path
) -> None:
    """Put the tokenizer into an export, if there is one."""
    if tokenizer is None:
        print("without a tokenizer: name one with --tokenizer to add it", file=sys.stderr)
    else:
        tokenizer.save(folder, model.max_position_embeddings, chat_template)


def with_end_of_text(model: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """The model's own eos_token_id, else its tokenizer's: without one, generation has no place to stop."""
    if model.eos_token_id is not None or tokenizer is None or tokenizer.eos_token is None:
        return model
    return model.model_copy(update={"eos_token_id": tokenizer.eos_token_id})


if __name__ == "__main__":
    sys.exit(main())
