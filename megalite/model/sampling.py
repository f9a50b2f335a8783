"""How the next token is chosen among all.

Shapes: b prompts, V vocabulary.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """The likeliest token, or a draw from the likely ones.

    temperature: what the logits are divided by; 0 takes the likeliest token.
    top_k: how many of the likeliest tokens take part in a draw; 0 stands for all.
    top_p: the fewest likeliest tokens that have this probability together take part; 1 stands for all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def draw(self, logits: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Logits [b, V] -> token ids int64 [b]."""
        if not self.temperature:
            return logits.argmax(-1)
        probabilities, ids = self.candidates(logits)
        chosen = torch.multinomial(probabilities, 1, generator=generator)
        return ids.gather(-1, chosen).squeeze(-1)

    def candidates(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities [b, V], largest first and zero for what takes no part, and whose they are [b, V]."""
        scores, ids = (logits.float() / self.temperature).sort(descending=True, stable=True)
        if self.top_k:
            scores[:, self.top_k :] = -torch.inf
        probabilities = scores.softmax(-1)
        if self.top_p < 1:
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0)
        return probabilities / probabilities.sum(-1, keepdim=True), ids
