"""Turn an exported Hugging Face folder into a GGUF file, by llama.cpp's own converter."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from megalite.error import UserError, run_command
from megalite.files import aside_of

EPILOG = """\
The converter, convert_hf_to_gguf.py, comes with the source of llama.cpp. It knows a byte-level BPE by the ids
of one text, so it refuses a newly trained one: "BPE pre-tokenizer was not recognized". This command looks at
tokenizer.json instead. If words are cut as GPT-2 cuts them, as by all byte-level kinds of
tools/train_tokenizer.py, it declares just that; any other tokenizer is left to the converter. Models with
experts need no special tokens of GLM's.

example:
  python tools/convert_to_gguf.py --model exported --llama-cpp ../llama.cpp --output model.gguf
"""
OUT_TYPES = ("f32", "f16", "bf16", "q8_0", "auto")
GPT2 = "gpt-2"
EXPERTS = "Glm4MoeForCausalLM"
GLM_TOKENS = {"[gMASK]", "<|user|>", "<|endoftext|>", "<|observation|>"}


class GGUFError(UserError):
    """The folder cannot become a GGUF file."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit status."""
    asked = build_parser().parse_args(argv)
    return run_command(lambda: convert(asked.model, asked.llama_cpp, asked.output, asked.type))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder that tools/convert_to_hf.py wrote")
    add("--llama-cpp", type=Path, required=True, metavar="DIR", help="source of llama.cpp, of 2026 or newer")
    add("--output", type=Path, required=True, help="GGUF file to write")
    kept = "of the weights; auto keeps 16 bits (default: %(default)s)"
    add("--type", choices=OUT_TYPES, default="auto", help=kept)
    return parser


def convert(folder: Path, llama_cpp: Path, output: Path, out_type: str) -> None:
    """Write `output`, or nothing. GGUFError when llama.cpp has no such tokenizer, or is not there."""
    if not (llama_cpp / "conversion" / "base.py").is_file():
        raise GGUFError(
            f"{llama_cpp} has no conversion/base.py: expected the source of llama.cpp, of 2026 or newer"
        )
    if not output.parent.is_dir():
        raise GGUFError(f"{output.parent} is no folder: make it, or name another --output")
    config, tokenizer = (read_json(folder / name) for name in ("config.json", "tokenizer.json"))
    pre_tokenizer = pre_tokenizer_of(folder, tokenizer)
    converter, aside = open_converter(llama_cpp), aside_of(output)
    text_model = sys.modules["conversion.base"].TextModel
    if pre_tokenizer is not None:
        text_model.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer
    if EXPERTS in config["architectures"] and not special_tokens(tokenizer) >= GLM_TOKENS:
        named = "_set_vocab_sentencepiece" if has_model(folder) else "_set_vocab_gpt2"
        converter.get_model_class(EXPERTS).set_vocab = getattr(text_model, named)
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outfile", str(aside), "--outtype", out_type]
    try:
        converter.main()
        aside.replace(output)
    finally:
        aside.unlink(missing_ok=True)
    print(f"wrote {output}")


def open_converter(llama_cpp: Path) -> Any:
    """llama.cpp's converter, as a module; conversion.base is loaded with it."""
    sys.path.insert(0, str(llama_cpp.resolve()))
    return importlib.import_module("convert_hf_to_gguf")


def pre_tokenizer_of(folder: Path, tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for how words are cut; None where its converter finds out for itself.

    Raises GGUFError for a tokenizer that llama.cpp would not read, or would read as another.
    """
    if has_model(folder):
        return None
    model, words = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise GGUFError(
            f"{folder} has a {model['type']} tokenizer of SentencePiece and no tokenizer.model, without "
            "which llama.cpp reads other tokens: only byte-bpe, lillm and sentencepiece-bpe can become GGUF"
        )
    if not model["merges"]:
        raise GGUFError(f"{folder} has a tokenizer without merges, which llama.cpp needs: train another")
    gpt2 = {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}
    cuts_as_gpt2 = {key: words.get(key) for key in gpt2} == gpt2
    changes = tokenizer.get("normalizer") or model.get("ignore_merges")
    return GPT2 if cuts_as_gpt2 and not changes else None


def has_model(folder: Path) -> bool:
    """Whether SentencePiece's own model lies there."""
    return (folder / "tokenizer.model").is_file()


def special_tokens(tokenizer: dict[str, Any]) -> set[str]:
    """The texts of the added tokens of a tokenizer.json."""
    return {token["content"] for token in tokenizer.get("added_tokens", [])}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. GGUFError when there is none."""
    if not path.is_file():
        raise GGUFError(f"{path} is missing: name a folder of tools/convert_to_hf.py, with a tokenizer")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GGUFError(f"{path} is not JSON: {error}: export it again") from None


if __name__ == "__main__":
    sys.exit(main())
