"""Random token ids to train on: what a step costs does not depend on them."""

import torch

from megalite.batch import Batch


def random_samples(num_samples: int, vocab_size: int, seq_length: int, device: torch.device) -> Batch:
    """The same in every process."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (num_samples, seq_length + 1), generator=generator).to(device)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
