"""The model in training, asked for the logits of any tokens: rank 0 asks, all ranks compute."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megalite.batch import Batch
from megalite.parallel.mappings import start_all_gather, wait_for
from megalite.pipeline.p2p import Peers
from megalite.pipeline.runner import PipelineRunner
from megalite.pipeline.schedule import forward_only
from megalite.training.trainer import StageTrainer

Result = TypeVar("Result")
Logits = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


class LiveModel:
    """Forward passes of a trainer's model, in whatever layout, between its optimizer steps.

    Samples are spread over the data-parallel ranks, each over those of context parallelism. Nothing of the
    training changes.
    """

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer, self.context = trainer, trainer.context
        topology, placement = self.context.topology, trainer.placement
        self._answering = False
        head_rank, _ = placement.holder(placement.num_stages - 1)
        first_with_head = head_rank * topology["pp"].stride
        self._sources = topology.members(first_with_head, "dp")  # who has logits, by data rank

    def lead(self, action: Callable[[Logits], Result]) -> Result | None:
        """What an action gives on rank 0, to which it is handed `logits`; None elsewhere. Collective.

        logits: (token ids [n, s], the place [n] of each sample's first real token, or None for 0) to logits
            [n, s, V]; attention and positions leave out what stands before that place.
        """
        with self.trainer.engine.evaluating():
            if self.context.rank == 0:
                try:
                    return action(self._ask)
                finally:
                    if not self._answering:  # else the others are in a forward, and hear nothing
                        _tell(None)
            while (question := _tell()) is not None:
                self._answer(*question)
            return None

    def _ask(self, input_ids: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
        # What is told keeps its device, which on another rank is another or none.
        question = input_ids.cpu(), None if starts is None else starts.cpu()
        _tell(question)
        self._answering = True
        logits = self._answer(*question)
        self._answering = False
        assert logits is not None
        return logits

    def _answer(self, input_ids: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor | None:
        """One forward pass; logits on rank 0."""
        batch, data = self._spread(input_ids, starts), self.context["dp"]
        mine = batch.split(data.size)[data.rank].to(self.context.device)
        logits = self._forward(mine)
        num_samples, length = input_ids.shape
        whole = self._collect(logits, mine)
        return None if whole is None else whole[:num_samples, :length]

    def _spread(self, input_ids: torch.Tensor, starts: torch.Tensor | None) -> Batch:
        """Samples and lengths filled up to what the layout divides."""
        num_samples, length = input_ids.shape
        more_samples = -num_samples % (self.context["dp"].size * self.context["pp"].size)
        more_tokens = -length % (self.trainer.sequence.num_chunks * self.context["tp"].size)
        ids = F.pad(input_ids, (0, more_tokens, 0, more_samples))
        if starts is None:
            return Batch(ids)
        first = F.pad(starts, (0, more_samples)).unsqueeze(1)
        places = torch.arange(ids.size(1), device=first.device)
        return Batch(ids, document_starts=first.where(places >= first, 0))

    def _forward(self, mine: Batch) -> torch.Tensor | None:
        """Logits [V, s, n] of this rank's samples where the head is."""
        trainer, stages, tp = self.trainer, self.context["pp"], self.context["tp"]
        assert mine.input_ids is not None
        num_samples, length = mine.input_ids.shape
        cut = replace(trainer.sequence, length=length)
        own = mine.part(cut.places.to(self.context.device))
        local_length = len(cut.places) // (tp.size if trainer.sequence_parallel else 1)
        shape = (local_length, num_samples // stages.size, trainer.hidden_size)
        peers = Peers(stages.group, shape, trainer.engine.dtype, self.context.device)
        runner = PipelineRunner(trainer.engine, peers, loss_chunk=trainer.runner.loss_chunk)
        trainer.engine.begin_pass()
        actions = forward_only(stages.rank, trainer.placement, stages.size)
        outputs = runner.outputs(actions, own.split(stages.size))
        if not outputs:
            return None
        whole, work = start_all_gather(torch.cat(outputs, dim=1).movedim(-1, 0), tp.group)
        wait_for(work)
        parts = whole[: trainer.vocab_size].transpose(0, 1)  # [s/c, V, n], of all ranks along the sequence:
        whole, work = start_all_gather(parts, cut.ranks.group)
        wait_for(work)
        return cut.in_order(whole, dim=0).transpose(0, 1).contiguous()

    def _collect(self, logits: torch.Tensor | None, mine: Batch) -> torch.Tensor | None:
        """The logits [n, s, V] of all data-parallel ranks, on rank 0."""
        rank = self.context.rank
        if rank in self._sources and rank != 0:
            assert logits is not None
            dist.send(logits, 0)
        if rank != 0:
            return None
        assert mine.input_ids is not None
        shape = (self.trainer.vocab_size, mine.input_ids.size(1), mine.input_ids.size(0))
        parts = []
        for source in self._sources:
            part = logits if source == 0 else torch.empty(shape, dtype=self.trainer.engine.dtype)
            assert part is not None
            if source != 0:
                part = part.to(self.context.device)
                dist.recv(part, source)
            parts.append(part)
        return torch.cat(parts, dim=2).permute(2, 1, 0)


def _tell(question: Any = None) -> Any:
    """Rank 0's question on every rank; None when there are no more."""
    told = [question]
    dist.broadcast_object_list(told, src=0)
    return told[0]
