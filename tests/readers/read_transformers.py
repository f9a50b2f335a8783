"""What transformers makes of folders: one JSON line for each. Needs transformers and torch, not megalite.

python read_transformers.py FOLDER...
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging


def read(folder: Path) -> dict[str, Any]:
    """How far the reader is from the reference beside the folder."""
    reference = json.loads((folder / "reference.json").read_text())
    model, report = AutoModelForCausalLM.from_pretrained(
        folder / "exported", dtype=torch.float32, output_loading_info=True
    )
    keys = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    expected = torch.tensor(reference["logits"])
    with torch.no_grad():
        logits = model(torch.tensor(reference["tokens"])).logits
    continuations = [generate(model, prompt, reference["new_tokens"]) for prompt in reference["prompts"]]
    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    named = PreTrainedTokenizerFast.from_pretrained(folder / "exported")  # the class that the folder names
    return {
        "loading": [f"{kind}: {', '.join(map(str, names))}" for kind, names in keys.items() if names],
        "logits": ((logits - expected).abs().max() / expected.abs().max()).item(),
        "greedy": continuations == reference["continuations"],
        "encode": [tokenizer(text).input_ids for text in reference["texts"]] == reference["ids"],
        "encode_as_named": [named(text).input_ids for text in reference["texts"]] == reference["ids"],
        "decode": [tokenizer.decode(ids) for ids in reference["ids"]] == reference["decoded"],
    }


def generate(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The tokens after a prompt; generation_config.json says where they end."""
    found = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)
    return found[0, len(prompt) :].tolist()


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    for name in sys.argv[1:]:
        print(json.dumps({"folder": Path(name).name} | read(Path(name))), flush=True)
