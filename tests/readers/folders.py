"""Small exported folders of every kind, made with megalite's tools, and beside each what megalite computes.

    FOLDER/exported/         what tools/convert_to_hf.py wrote, in bfloat16 as is its default
    FOLDER/reference.json    logits and greedy tokens in float32, and the ids of some texts

No code of a reader takes part: weights are drawn here, logits are those of megalite's own model.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from megalite.checkpoint.agreement import alone
from megalite.checkpoint.format import CONFIG, Piece
from megalite.checkpoint.model import build_megalite_model, megalite_logits
from megalite.checkpoint.save import save_checkpoint
from megalite.checkpoint.weights import Weights
from megalite.config.load import dump_run
from megalite.config.model import ModelConfig
from megalite.config.run import RunConfig
from megalite.data.corpus import write_jsonl
from megalite.model.decoding import decode
from megalite.model.llama import LlamaStage
from megalite.model.sampling import Sampling
from megalite.model.table import buffer_table, model_table
from megalite.tokenizer.load import load_tokenizer
from tools import convert_to_hf, train_tokenizer

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,  # heads of 32 numbers, the fewest that vLLM takes on a CPU
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_theta": 50000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
EXPERTS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "routed_scaling_factor": 2.5,
}
TEXTS = [
    "def read(self, size=-1):\n    return self._buffer[:size]  # bytes\n",
    "It's the dogs' day; they'll say \u201cno\u201d, I'M sure, we've 3.14159 of 1234567890.",
    "two  spaces,\ttabs\tand\nlines\r\n\n  indented\n\n\n",
    " leading and trailing ",
    "\u00e9t\u00e9 \u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "\U0001f600 e\u0301 \ufb01 \u00a0 \u3000",
    "Hello , world ! n't 's ----======((((()))))",
]
NEW_TOKENS = 24


@dataclass(frozen=True)
class Kind:
    """What one folder holds.

    model: fields of ModelConfig besides TINY.
    tokenizer: of tools/train_tokenizer.py, with `tokenizer_size` ids, or "bytes".
    options: of tools/convert_to_hf.py.
    begin: the token that tokenizer.json is made to put before every text, as Llama's own tokenizers do.
    added: a special token that is added to those that were trained.
    """

    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "byte-bpe"
    tokenizer_size: int = 512
    options: tuple[str, ...] = ()
    begin: str | None = None
    added: str | None = None


KINDS = {
    "dense-tied": Kind({"tie_word_embeddings": True}),
    "dense-llama3-rope": Kind(LLAMA3_ROPE, "sentencepiece-bpe"),
    "dense-linear-rope": Kind({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "lillm"),
    "dense-odd-vocabulary": Kind({"vocab_size": 509}, tokenizer_size=501),
    "dense-biases": Kind({"attention_bias": True, "mlp_bias": True}),
    "dense-wide-heads": Kind({"head_dim": 64, "rms_norm_eps": 1e-3}, "sentencepiece-unigram"),
    "dense-begin-of-text": Kind({}, "sentencepiece-bpe", 500, begin="<s>", added="<|user|>"),
    "dense-bytes": Kind({"vocab_size": 257}, "bytes"),
    "sharded": Kind(options=("--max-shard-size", "100KB")),
    "qwen2": Kind({"attention_bias": True, "attention_out_bias": False, "tie_word_embeddings": True}),
    "qwen3": Kind({"use_qk_norm": True, "head_dim": 64}),
    "experts": Kind(EXPERTS),
    "experts-head-norms": Kind(EXPERTS | {"use_qk_norm": True, "norm_topk_prob": False}, "sentencepiece-bpe"),
}


def make_folders(root: Path, names: list[str]) -> list[Path]:
    """Make the folders of these names anew; their paths."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    corpus = root / "corpus.jsonl"
    write_jsonl(corpus, max_bytes=400_000)
    return [make_folder(root / name, KINDS[name], corpus) for name in names]


def make_folder(folder: Path, kind: Kind, corpus: Path) -> Path:
    """One folder, and the reference beside it."""
    tokenizer = kind.tokenizer
    if tokenizer != "bytes":
        tokenizer = str(folder / "tokenizer")
        size = ["--kind", kind.tokenizer, "--vocab-size", str(kind.tokenizer_size)]
        run(train_tokenizer, "--input", str(corpus), "--output", tokenizer, *size)
        edit_tokenizer(folder / "tokenizer" / "tokenizer.json", kind)
    data = {"train": ["data/none"], "tokenizer": tokenizer}
    model = TINY | kind.model | {"eos_token_id": load_tokenizer(tokenizer).eos_token_id}
    config = RunConfig.model_validate({"model": model, "data": data})
    checkpoint = save_random_checkpoint(folder / "run" / "checkpoints", config)
    places = ("--checkpoint", str(folder / "run"), "--output", str(folder / "exported"))
    run(convert_to_hf, *places, *kind.options, "--no-verify")
    reference = refer(Weights(checkpoint, config.model, "bfloat16"), tokenizer, kind)
    (folder / "reference.json").write_text(json.dumps(reference))
    return folder


def edit_tokenizer(file: Path, kind: Kind) -> None:
    """Add the kind's token to a tokenizer.json, and make it begin every text with another."""
    backend = Backend.from_file(str(file))
    if kind.added:
        backend.add_special_tokens([kind.added])
    if kind.begin:
        named = [(kind.begin, backend.token_to_id(kind.begin))]
        backend.post_processor = TemplateProcessing(single=f"{kind.begin} $A", special_tokens=named)
    backend.save(str(file))


def run(tool: Any, *arguments: str) -> None:
    """Run a tool as its command line does."""
    status = tool.main(list(arguments))
    assert status == 0, f"{tool.__name__} ended with {status}"


def save_random_checkpoint(root: Path, run: RunConfig) -> Path:
    """Weights of size 2/sqrt(inputs), so that every part changes the logits; vectors are not all ones.

    Selection biases are as large as the differences of the scores, so that they change choices.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
        if kind == "buffer":
            return torch.rand(shape, generator=generator) * 0.4 - 0.2
        if len(shape) == 1:
            return torch.rand(shape, generator=generator) + 0.5
        return torch.randn(shape, generator=generator) * 2 * shape[-1] ** -0.5

    rows = {"weight": model_table(run.model), "buffer": buffer_table(run.model)}
    pieces = [
        Piece(row.name, kind, row.shape, (0,) * len(row.shape), row.shape, 0, draw(kind, row.shape).view(-1))
        for kind, table in rows.items()
        for row in table
    ]
    files = {CONFIG: dump_run(run)}
    here: Any = {"rank": 0, "world_size": 1, "gather": alone}
    return save_checkpoint(root, 1, pieces, {"step": 1}, files, **here)


def refer(weights: Weights, tokenizer: str, kind: Kind) -> dict[str, Any]:
    """What a reader must find: see the keys."""
    stage, text_tokenizer = build_megalite_model(weights), load_tokenizer(tokenizer)
    texts = TEXTS + [f"{kind.added}hello{kind.added} there"] * (kind.added is not None)
    ids = text_tokenizer.encode_batch(texts)  # megalite itself adds no token
    first = [] if kind.begin is None else [text_tokenizer.token_to_id(kind.begin)]
    tokens = torch.randint(weights.model.vocab_size, (2, 64), generator=torch.Generator().manual_seed(1))
    prompts = [ids[0], ids[1], tokens[0, :5].tolist()]
    return {
        "tokens": tokens.tolist(),
        "logits": megalite_logits(stage, tokens).tolist(),
        "prompts": prompts,
        "continuations": [continue_greedily(stage, prompt, weights.model) for prompt in prompts],
        "new_tokens": NEW_TOKENS,
        "texts": texts,
        "ids": [first + each for each in ids],
        "decoded": [text_tokenizer.decode(first + each) for each in ids],
    }


def continue_greedily(stage: LlamaStage, prompt: list[int], model: ModelConfig) -> list[int]:
    """The likeliest tokens, up to and with the end of text."""
    tokens: list[int] = []
    for (token,) in decode(stage, [prompt], NEW_TOKENS, Sampling(temperature=0)):
        tokens.append(token)
        if token == model.eos_token_id:
            break
    return tokens
