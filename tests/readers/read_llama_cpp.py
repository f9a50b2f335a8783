"""What llama.cpp makes of GGUF files: one JSON line for each. Needs llama-cpp-python, not megalite.

python read_llama_cpp.py NAME.gguf FOLDER [NAME.gguf FOLDER]...
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama


def read(gguf: str, folder: Path) -> dict[str, Any]:
    """How far the reader is from the reference beside the folder."""
    reference = json.loads((folder / "reference.json").read_text())
    model = Llama(
        gguf,
        n_ctx=128,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        type_k=GGML_TYPE_F32,  # the cache of keys and values is in float16 by default
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    expected = np.array(reference["logits"])
    logits = np.stack([compute(model, tokens) for tokens in reference["tokens"]])
    continuations = [generate(model, prompt, reference["new_tokens"]) for prompt in reference["prompts"]]
    # its add_bos asks for what the file says, as llama-cli does
    ids = [model.tokenize(text.encode(), add_bos=True, special=True) for text in reference["texts"]]
    decoded = [model.detokenize(each, special=True).decode() for each in reference["ids"]]
    return {
        "loading": [],
        "logits": float(np.abs(logits - expected).max() / np.abs(expected).max()),
        "greedy": continuations == reference["continuations"],
        "encode": ids == reference["ids"],
        "decode": all(map(is_text, decoded, reference["decoded"])),
    }


def is_text(decoded: str, text: str) -> bool:
    """The pieces of a SentencePiece model begin with the space that it puts before every text."""
    return decoded in (text, f" {text}")


def compute(model: Llama, tokens: list[int]) -> np.ndarray:
    """Logits [s, V]."""
    model.reset()
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)])


def generate(model: Llama, prompt: list[int], new_tokens: int) -> list[int]:
    """The likeliest tokens after a prompt; the file says which one ends them."""
    model.reset()
    model.eval(prompt)
    found: list[int] = []
    while len(found) < new_tokens:
        found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        if found[-1] == model.token_eos():
            break
        model.eval(found[-1:])
    return found


if __name__ == "__main__":
    for gguf, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        print(json.dumps({"folder": Path(folder).name} | read(gguf, Path(folder))), flush=True)
