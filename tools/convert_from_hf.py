"""Turn a Hugging Face folder, of a Llama, Mistral, Qwen or Glm4Moe, into a megalite checkpoint."""

import argparse
import sys
from pathlib import Path

from megalite.checkpoint.hf import import_folder
from megalite.checkpoint.hf_folder import HFFolder
from megalite.checkpoint.proof import prove
from megalite.checkpoint.verification import verify
from megalite.checkpoint.weights import Weights
from megalite.config.data import DataConfig
from megalite.config.run import RunConfig
from megalite.error import run_command
from megalite.model.flops import num_parameters

EPILOG = """\
The checkpoint is of step 0 and holds weights alone. A run begins with it under checkpoint.start_from, in any
layout, and its config.yaml states the model for --config; tools/generate.py continues prompts with it. No GPU
is needed. Memory: two tensors and 0.5 GB; the comparison with transformers at the end holds the model twice,
in float32.

example:
  python tools/convert_from_hf.py --model downloads/llama --output runs/llama/checkpoints
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: convert(arguments), interrupted="no checkpoint was written")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder with config.json and weights")
    add("--output", type=Path, required=True, help="RUN_DIR/checkpoints; must hold no checkpoints")
    proof = "compare all weights and some logits with transformers' (default: where memory is enough)"
    add("--verify", action=argparse.BooleanOptionalAction, help=proof)
    return parser


def convert(arguments: argparse.Namespace) -> int:
    """Import, and verify if asked to, or if it fits and nothing was said; 0 when all is well."""
    folder = HFFolder(arguments.model)
    checkpoint = import_folder(folder, arguments.output, describe_run(folder, arguments.output))
    num_elements = num_parameters(folder.model)
    print(f"wrote {num_elements:,} parameters of {folder.path} to {checkpoint}")
    about = f"{checkpoint} does not agree with {folder.path}"
    weights = Weights(checkpoint, folder.model)
    return prove(lambda: verify(weights, folder), folder.model, arguments.verify, about)


def describe_run(folder: HFFolder, output: Path) -> RunConfig:
    """The run that goes into the checkpoint: the folder's model, and its tokenizer where it has one."""
    data = DataConfig(tokenizer=folder.tokenizer)
    return RunConfig(model=folder.model, data=data, output_dir=str(output.parent))


if __name__ == "__main__":
    sys.exit(main())
