"""One step of torch's own layers in DeepSpeed's engine: `deepspeed benchmarks/bare_deepspeed.py`."""

import argparse
from pathlib import Path

import deepspeed
import torch
from torch import nn

CONFIG = Path(__file__).parent.parent / "configs" / "deepspeed" / "zero3.json"
VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, SEQ_LENGTH = 257, 192, 4, 128


def main() -> None:
    """Says when the step is over, as megalite does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)  # from the launcher
    parser.parse_args()
    layer = nn.TransformerEncoderLayer(HIDDEN_SIZE, 4, 4 * HIDDEN_SIZE, batch_first=True)
    layers = nn.TransformerEncoder(layer, NUM_LAYERS, enable_nested_tensor=False)
    model = nn.Sequential(
        nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE), layers, nn.Linear(HIDDEN_SIZE, VOCAB_SIZE, bias=False)
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=str(CONFIG))
    for _ in range(engine.gradient_accumulation_steps()):
        tokens = torch.randint(VOCAB_SIZE, (engine.train_micro_batch_size_per_gpu(), SEQ_LENGTH))
        loss = nn.functional.cross_entropy(engine(tokens).flatten(0, 1), tokens.flatten())
        engine.backward(loss)
        engine.step()
    if torch.distributed.get_rank() == 0:
        print(f"step 1 | loss {float(loss):.4f}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
