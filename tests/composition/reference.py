"""A composition in one process: transformers, PEFT where adapters are, and losses and steps written out.

It knows no DeepSpeed, no group, no pipeline and no checkpoint; of our side it takes the initial weights.
"""

from dataclasses import dataclass, field
from functools import partial
from math import nan
from typing import Any
from unittest.mock import patch

import peft
import torch
from peft.utils import transformers_weight_conversion as peft_conversion

from megalite.batch import Batch
from tests.composition.compositions import LIMIT, LORA, ChatBatches, Composition
from tests.composition.world import NUM_STEPS, PROMPTS, SAVED
from tests.fp8_reference import with_fp8
from tests.muon_reference import WrittenOutMuon, WrittenOutQkClip
from tests.reference import (
    Routers,
    WrittenOutAdamW,
    learning_rate_of,
    mean_loss,
    transformers_model,
    within_documents,
)
from tests.test_lora_equivalence import draw, our_name, target_modules
from tests.test_muon_equivalence import TAU
from tests.test_preference_equivalence import formula_of
from tests.trainers import BIAS_RATE, SEED


@dataclass
class Expected:
    """Losses and norms of all steps, and what validation and logits are after SAVED of them."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    validation: float = nan
    logits: torch.Tensor | None = None


class Plain:
    """One process that trains a composition."""

    def __init__(self, composition: Composition, chats: ChatBatches) -> None:
        self.composition, self.chats = composition, chats
        self.rate = composition.before.rate
        theirs: Any = transformers_model(composition.model, SEED)
        if composition.before.fp8 != "none":
            theirs = with_fp8(theirs, composition.before.fp8)
        self.routers = Routers(theirs, composition.model)
        self.clip = WrittenOutQkClip(theirs, TAU) if composition.optimizer == "qk-clip" else None
        self.model = _with_adapters(theirs, composition) if composition.lora else theirs
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        muon = composition.optimizer != "adamw"
        self.optimizer = WrittenOutMuon(theirs) if muon else WrittenOutAdamW(self.trained)

    def train(self) -> Expected:
        told = Expected()
        for step in range(NUM_STEPS):
            if step == SAVED:
                with torch.no_grad():
                    told.validation = self._loss(self._batch(0)).item()
                    told.logits = self.model(PROMPTS).logits
            batch = self._batch(step)
            loss = self._loss(batch)
            (loss + self.routers.balancing_loss(batch)).backward()
            norm = sum(p.grad.double().square().sum() for p in self.trained).sqrt().item()
            self._update(batch, step, min(1.0, LIMIT / (norm + 1e-6)))
            told.losses.append(loss.item())
            told.norms.append(norm)
        return told

    def _batch(self, step: int) -> Batch:
        return self.composition.batch(step, self.chats)

    def _loss(self, batch: Batch) -> torch.Tensor:
        if batch.references is None:
            return mean_loss(self.model, batch)
        preference = self.composition.preference
        return formula_of(preference)(partial(self._forward, batch), batch, preference)[0]

    def _forward(self, batch: Batch, input_ids: torch.Tensor) -> Any:
        """What the model makes of a batch's own rows, or of its mismatched ones, within their documents."""
        rows = batch if input_ids is batch.input_ids else batch.mismatched
        assert rows is not None and input_ids is rows.input_ids
        return self.model(input_ids, **within_documents(rows))

    def _update(self, batch: Batch, step: int, scale: float) -> None:
        if self.routers.gates and not self.composition.lora:
            self.routers.move(self.routers.tokens(batch), BIAS_RATE)
        self.optimizer.step(self.rate * learning_rate_of(step), scale)
        if self.clip:
            self.clip.largest = self.clip.largest[-len(self.clip.layers) :]  # of the step's last forward
            self.clip.step()


def _with_adapters(theirs: Any, composition: Composition) -> Any:
    """As in tests/test_lora_equivalence.py."""
    options = {"r": LORA.rank, "lora_alpha": LORA.alpha}
    options["target_modules"] = target_modules(composition.before, LORA)
    with patch.object(peft_conversion, "get_checkpoint_conversion_mapping", lambda model_type: None):
        model = peft.get_peft_model(theirs, peft.LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(draw(our_name(name), tuple(parameter.shape)))
    return model
