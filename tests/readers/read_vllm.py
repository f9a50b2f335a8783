"""What vLLM makes of folders: one JSON line for each. Needs a vLLM for CPUs, not megalite.

python read_vllm.py FOLDER...
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

import torch
from vllm import LLM, SamplingParams


def read(folder: Path) -> dict[str, Any]:
    """How far the reader is from the reference beside the folder."""
    reference = json.loads((folder / "reference.json").read_text())
    options: Any = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_logprobs": -1}
    model = LLM(str(folder / "exported"), **options)
    expected = torch.tensor(reference["logits"])
    scores = score(model, reference["tokens"], expected.shape[-1])
    difference = (scores - expected.log_softmax(-1)[:, :-1]).abs().max()
    continuations = generate(model, reference["prompts"], reference["new_tokens"])
    tokenizer = model.get_tokenizer()
    return {
        "loading": [],
        "logits": (difference / expected.abs().max()).item(),
        "greedy": continuations == reference["continuations"],
        "encode": [tokenizer(text).input_ids for text in reference["texts"]] == reference["ids"],
        "decode": [tokenizer.decode(ids) for ids in reference["ids"]] == reference["decoded"],
    }


def score(model: LLM, tokens: list[list[int]], vocab_size: int) -> torch.Tensor:
    """Log-probabilities [b, s - 1, V] of the token after each of [b, s]."""
    every = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": each} for each in tokens], every)
    return torch.tensor(
        [
            [[at[token].logprob for token in range(vocab_size)] for at in output.prompt_logprobs[1:]]
            for output in outputs
        ]
    )


def generate(model: LLM, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The tokens after each prompt; generation_config.json says where they end."""
    likeliest = SamplingParams(temperature=0, max_tokens=new_tokens)
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], likeliest)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps({"folder": Path(name).name} | read(Path(name))), flush=True)
