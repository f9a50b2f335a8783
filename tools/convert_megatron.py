"""Turn a checkpoint of Megatron-LM into a megalite checkpoint, or a megalite checkpoint into Megatron's."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megalite.checkpoint.format import CheckpointError
from megalite.checkpoint.hf_config import model_config
from megalite.checkpoint.load import read_config, require_checkpoint
from megalite.checkpoint.megatron_args import model_of_args
from megalite.checkpoint.megatron_conversion import Target, export_megatron, import_megatron
from megalite.checkpoint.megatron_folder import MegatronFolder, open_megatron
from megalite.checkpoint.weights import Weights
from megalite.config.load import load_run
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from megalite.error import run_command
from megalite.model.flops import num_parameters

EPILOG = """\
From Megatron: the classic form (iter_0000100/mp_rank_00_000/model_optim_rng.pt, of any tensor, pipeline and
expert parallel size) and torch's distributed form (--ckpt-format torch_dist), of Llamas and of mixtures of
experts, with transformer-engine or local layers. No code of a file is run. The model is what Megatron's
arguments say, which are in the checkpoint, or what --model-config says. Megatron's embedding is padded:
unless its arguments have vocab_size, give --vocab-size, else the padding stays. The checkpoint is of step 0
and holds weights alone; a run begins with it under checkpoint.start_from.

To Megatron: the classic form, for any tensor, pipeline and expert parallel size, or with
--ckpt-format torch_dist the distributed form, which Megatron loads on any ranks. Where stages cannot have
equally many layers, the first and the last have others. Train on with the same --ckpt-format,
--use-checkpoint-args and --finetune, or --no-load-optim and --no-load-rng; what Megatron does not take from a
checkpoint is printed, to be told to it. It loads what it finds and says little of names that it does not:
--transformer-impl must be the one that it will run with.

Neither needs a GPU or Megatron. Memory: from the classic form one tensor, as its files are mapped; from the
distributed form the model once; to the classic form one rank's file, to the distributed form a few copies of
the largest tensor.

examples:
  python tools/convert_megatron.py --from-megatron downloads/llama --output runs/llama/checkpoints
  python tools/convert_megatron.py --to-megatron runs/default/checkpoints --output megatron --tp-size 2
  python tools/convert_megatron.py --to-megatron runs/default/checkpoints --output megatron \\
      --ckpt-format torch_dist
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    arguments = build_parser().parse_args(argv)
    work = from_megatron if arguments.from_megatron else to_megatron
    return run_command(lambda: work(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    ways = parser.add_mutually_exclusive_group(required=True)
    where = "folder of an iteration, or the one with latest_checkpointed_iteration.txt"
    ways.add_argument("--from-megatron", type=Path, metavar="DIR", help=where)
    where = "RUN_DIR/checkpoints (the newest valid one), or a step-N in it"
    ways.add_argument("--to-megatron", type=Path, metavar="DIR", help=where)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="RUN_DIR/checkpoints, or a new folder for Megatron")
    add("--model-config", type=Path, metavar="FILE", help="a run's YAML, or a config.json of Hugging Face")
    add("--vocab-size", type=positive, metavar="N", help="rows of the embedding that are tokens")
    form = "torch: files per rank; torch_dist: the distributed form (default: %(default)s)"
    add("--ckpt-format", choices=["torch", "torch_dist"], default="torch", help=form)
    add("--tp-size", type=positive, default=1, help="tensor-parallel ranks to write for (default: 1)")
    add("--pp-size", type=positive, default=1, help="pipeline stages to write for (default: 1)")
    add("--ep-size", type=positive, default=1, help="expert-parallel ranks to write for (default: 1)")
    for end in ("first", "last"):
        layers = f"decoder layers of the {end} stage (default: as even as can be)"
        add(f"--decoder-{end}-pipeline-num-layers", type=positive, metavar="N", help=layers)
    layers = "layers that Megatron will run with (default: %(default)s)"
    add(
        "--transformer-impl",
        choices=["transformer_engine", "local"],
        default="transformer_engine",
        help=layers,
    )
    padding = "the vocabulary is padded to a multiple of this times --tp-size (default: %(default)s)"
    add("--make-vocab-size-divisible-by", type=positive, default=128, metavar="N", help=padding)
    dtype = "of the weights to write (default: %(default)s)"
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help=dtype)
    return parser


def positive(text: str) -> int:
    """A size."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def from_megatron(arguments: argparse.Namespace) -> None:
    """Import."""
    folder = open_megatron(arguments.from_megatron)
    model = describe_model(folder, arguments.model_config, arguments.vocab_size)
    run = RunConfig(model=model, output_dir=str(arguments.output.parent))
    checkpoint = import_megatron(folder, arguments.output, run)
    print(f"wrote {num_parameters(model):,} parameters of {folder.path} to {checkpoint}")
    print(f"vocabulary of {model.vocab_size}; another one is named by --vocab-size", file=sys.stderr)


def describe_model(folder: MegatronFolder, config: Path | None, vocab_size: int | None) -> ModelConfig:
    """What the file says, if there is one, else Megatron's arguments in the checkpoint."""
    if config is None:
        if folder.args is None:
            raise CheckpointError(f"{folder.path} does not tell the model: describe it (--model-config)")
        return model_of_args(folder.args, str(folder.path), vocab_size)
    model = read_model(config)
    return model if vocab_size is None else ModelConfig(**(model.model_dump() | {"vocab_size": vocab_size}))


def read_model(config: Path) -> ModelConfig:
    """The model of a run's YAML or of Hugging Face's config.json."""
    if config.suffix != ".json":
        return load_run(str(config)).model
    try:
        return model_config(json.loads(config.read_text(encoding="utf-8")), str(config))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{config} is not JSON: {error}") from None


def to_megatron(arguments: argparse.Namespace) -> None:
    """Export."""
    print(f"checking the files of {arguments.to_megatron}", file=sys.stderr)
    checkpoint = require_checkpoint(arguments.to_megatron, lambda line: print(line, file=sys.stderr))
    weights = Weights(checkpoint, read_config(checkpoint).model, arguments.dtype)
    target = Target(
        form=arguments.ckpt_format,
        tp_size=arguments.tp_size,
        pp_size=arguments.pp_size,
        ep_size=arguments.ep_size,
        first_layers=arguments.decoder_first_pipeline_num_layers,
        last_layers=arguments.decoder_last_pipeline_num_layers,
        local=arguments.transformer_impl == "local",
        divisor=arguments.make_vocab_size_divisible_by,
    )
    args = export_megatron(weights, arguments.output, target)
    print(f"wrote {num_parameters(weights.model):,} parameters of {checkpoint} to {arguments.output}")
    if options := to_be_told(args):
        print(f"Megatron does not take these from a checkpoint: run it with {options}", file=sys.stderr)


# Options of Megatron that it does not take from a checkpoint, and what it takes for them.
NOT_TAKEN = {
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "norm_epsilon": 1e-5,
    "qk_layernorm": False,
    "rotary_seq_len_interpolation_factor": None,
    "rope_scaling_factor": 8.0,
    "use_rope_scaling": False,
}


def to_be_told(args: dict[str, Any]) -> str:
    """The options that Megatron must be given, even under --use-checkpoint-args; may be empty."""
    given = {name: args[name] for name, absent in NOT_TAKEN.items() if args.get(name, absent) != absent}
    return " ".join(
        f"--{name.replace('_', '-')}" + f" {value}" * (value is not True) for name, value in given.items()
    )


if __name__ == "__main__":
    sys.exit(main())
