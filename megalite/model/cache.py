"""Keys and values of the tokens so far, so that a model computes each new token alone.

Shapes: b prompts, s new tokens, n tokens so far with them, K/t key/value heads of this rank, D head size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megalite.kernels.attention import Attention
from megalite.model.spans import AttentionSpans


class LayerCache:
    """One layer's keys and values; room for all tokens is taken when the first ones come, in their dtype."""

    def __init__(self, room_tokens: int) -> None:
        self.room_tokens = room_tokens
        self._pair: tuple[torch.Tensor, ...] | None = None

    def append(self, first: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep those of new tokens, [b, K/t, s, D], of which the first is number `first`.

        Returns those of all tokens up to the last of them, [b, K/t, n, D].
        """
        if self._pair is None:
            shape = (*key.shape[:2], self.room_tokens, key.size(-1))
            self._pair = (key.new_empty(shape), value.new_empty(shape))
        stop = first + key.size(2)
        for kept, new in zip(self._pair, (key, value), strict=True):
            kept[:, :, first:stop] = new
        keys, values = (kept[:, :, :stop] for kept in self._pair)
        return keys, values


@dataclass(frozen=True, kw_only=True)
class CachedSpans(AttentionSpans):
    """The spans of new tokens in one layer: they see the tokens in its cache as well.

    first: the number of the first of them.
    seen:  true where new token i may see token j, [b, 1, s, n].
    """

    layer: LayerCache
    first: int
    seen: torch.Tensor

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention: Attention
    ) -> torch.Tensor:
        """query [b, heads, s, D], key and value [b, K/t, s, D], which are kept -> [b, heads, s, D].

        By torch, whatever the kernel of a model that trains: few tokens look at many.
        """
        key, value = self.layer.append(self.first, key, value)
        grouped = query.size(1) != key.size(1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.seen, enable_gqa=grouped)


class KeyValueCache:
    """What the layers of a model remember of some prompts and of what came after them.

    num_padding: int64 [b], the tokens that only fill up the front of each prompt, to make all equally long:
        no other token sees them, and positions begin after them.
    room_tokens: that each prompt may come to, padding included.
    """

    def __init__(self, num_layers: int, num_padding: torch.Tensor, room_tokens: int) -> None:
        self.layers = [LayerCache(room_tokens) for _ in range(num_layers)]
        self.num_padding, self.num_tokens = num_padding, 0

    def extend(self, num_new: int) -> list[CachedSpans]:
        """The spans of so many new tokens of each prompt, for every layer; they are to go through once."""
        first, self.num_tokens = self.num_tokens, self.num_tokens + num_new
        place = torch.arange(self.num_tokens, device=self.num_padding.device)
        new, padding = place[first:].unsqueeze(-1), self.num_padding.view(-1, 1, 1)
        # Padding sees itself: attention to nothing would be no number.
        seen = ((place >= padding) & (place <= new)) | (place == new)
        positions = (place[first:] - self.num_padding.unsqueeze(-1)).clamp(min=0)
        starts = self.num_padding.unsqueeze(-1).expand_as(positions)
        return [
            CachedSpans(starts, positions, layer=layer, first=first, seen=seen.unsqueeze(1))
            for layer in self.layers
        ]
