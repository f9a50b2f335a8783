"""A model that computes elsewhere, as transformers' own: for the harness, which knows no other."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers.modeling_outputs import CausalLMOutput


class LiveCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """Scores and continues text by asking for logits.

    It keeps no cache: each new token of a continuation costs a whole forward.

    Args:
        fields: of config.json.
        logits: (token ids [n, s], each sample's first real token [n], or None where all are real) to logits
            [n, s, V], on the device of the ids.
        device: where ids are wanted.
    """

    config_class = transformers.PretrainedConfig

    def __init__(
        self,
        fields: Mapping[str, Any],
        logits: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
        device: torch.device,
    ) -> None:
        model_class: Any = getattr(transformers, fields["architectures"][0])
        super().__init__(model_class.config_class.from_dict(fields))
        self._logits, self._device = logits, device

    # transformers looks for both in the weights, of which there are none here.

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> CausalLMOutput:
        """Logits of right-padded samples, or, by their attention mask, of left-padded ones."""
        starts = None if attention_mask is None else (attention_mask == 0).sum(dim=1)
        return CausalLMOutput(logits=self._logits(input_ids, starts))

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """All tokens each time."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}
