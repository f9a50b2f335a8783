"""How large attention's logits become: the largest of each head, which attention itself does not tell."""

import torch

from megalite.model.spans import AttentionSpans

ROWS = 512  # queries at a time: their logits are held in fp32


class LogitPeaks:
    """The largest logit q k^T / sqrt(D) of each of this rank's query heads, since it was cleared.

    Over all samples and the pairs that attention sees, padding tokens among them.
    """

    def __init__(self, num_heads: int, device: torch.device) -> None:
        self.values = torch.full((num_heads,), -torch.inf, device=device)

    def clear(self) -> None:
        """Begin again."""
        self.values.fill_(-torch.inf)

    @torch.no_grad()
    def see(self, query: torch.Tensor, key: torch.Tensor, spans: AttentionSpans | None) -> None:
        """One micro batch: query [b, heads, s, D], key [b, KV heads, s, D], both rotated."""
        length, head_dim = query.shape[2:]
        grouped = query.unflatten(1, (key.size(1), -1)).float()
        keys = key.float().unsqueeze(2).transpose(-1, -2)
        place = torch.arange(length, device=query.device)
        for first in range(0, length, ROWS):
            rows = place[first : first + ROWS]
            last = min(first + ROWS, length)
            logits = grouped[:, :, :, rows] @ keys[..., :last] * head_dim**-0.5
            seen = (place[:last] <= rows.unsqueeze(1)).expand(query.size(0), 1, 1, -1, -1)
            if spans is not None and spans.starts is not None:
                seen = seen & (place[:last] >= spans.starts[:, rows].unsqueeze(-1))[:, None, None]
            largest = logits.masked_fill(~seen, -torch.inf).amax(dim=(0, 3, 4)).flatten()
            torch.maximum(self.values, largest, out=self.values)
