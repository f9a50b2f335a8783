"""Sources of conversations, pairs or single answers to the samples of a run: the one entrance.

conversations = open_chat("conversations", ["chat.jsonl"], tokenizer, template, seq_length=2048)
samples = conversations.samples(order, count=1000)
loader = ChatLoader(samples, global_batch_samples=..., ...)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalite.data.blend import parse_blend
from megalite.data.chat_samples import ChatSamples, Kind, sequences_of
from megalite.data.conversation import Encoder, RecordEncoder, Template
from megalite.data.error import DataError
from megalite.data.packing import SampleOrder
from megalite.data.prepared import PreparedSource, open_prepared
from megalite.data.rows import open_rows
from megalite.data.tables import HUB

Report = Callable[[str], None]


@dataclass(frozen=True)
class ChatData:
    """Sources with their tokens."""

    sources: tuple[PreparedSource, ...]
    weights: tuple[float, ...] | None
    kind: Kind

    def __len__(self) -> int:
        """Conversations, pairs or answers."""
        return sum(len(source) for source in self.sources) // sequences_of(self.kind)

    def samples(self, order: SampleOrder, count: int | None) -> ChatSamples:
        """`count` samples, in as many epochs as they take; None for one epoch, which takes no weights.

        Raises DataError when pairs or single answers are to be packed, or one epoch has weights.
        """
        if order.packing and self.kind != "conversations":
            raise DataError("answers that are compared cannot share samples: set data.packing=false")
        return ChatSamples(self.sources, self.weights, order, count, kind=self.kind)

    def once(self, seq_length: int, multiple_of: int = 1) -> ChatSamples:
        """Each conversation or pair in a sample of its own, in order, whatever the weights.

        The last samples are the first ones again, to make their number a multiple of a global batch.
        """
        order = SampleOrder(seq_length, seed=0, packing=False, shuffle=False)
        count = -(-len(self) // multiple_of) * multiple_of
        return ChatSamples(self.sources, None, order, count, kind=self.kind)


def open_chat(
    kind: Kind,
    sources: Sequence[str],
    tokenizer: Encoder,
    template: Template | None,
    *,
    seq_length: int,
    cache_dir: str | Path | None = None,
    report: Report | None = None,
    progress: bool = False,
) -> ChatData:
    """Sources of conversations, pairs of answers, or answers with a label; prepared once, then found.

    sources: files, folders or hf:NAME, or weight and source in turn.
    cache_dir: None for `cache` beside the first source, or in the current folder where that is on the Hub.
    template: may be None where no source has messages. report: is told of each source what was left out.

    Raises DataError for a source that cannot be read, or of which nothing can be used.
    """
    encoder = RecordEncoder(tokenizer, template, seq_length)
    names, weights = parse_blend(sources)
    folder = cache_beside_source(names[0]) if cache_dir is None else Path(cache_dir)
    made_from = {
        "kind": kind,
        "tokenizer": tokenizer.fingerprint(),
        "template": template and template.fingerprint,
        "seq_length": seq_length,
    }
    encode = {"conversations": encoder.conversation, "pairs": encoder.pair, "unpaired": encoder.unpaired}
    opened = []
    for name in names:
        source = open_prepared(
            open_rows(name),
            encode[kind],
            made_from=made_from,
            vocab_size=tokenizer.vocab_size,
            cache_dir=folder,
            progress=progress,
        )
        opened.append(source)
        if report:
            report(source.summary())
    return ChatData(tuple(opened), tuple(weights) if weights else None, kind)


def cache_beside_source(name: str) -> Path:
    """Where prepared data lies if nothing is said: beside its source, or here where that is on the Hub."""
    return Path("cache") if name.startswith(HUB) else Path(name).parent / "cache"
