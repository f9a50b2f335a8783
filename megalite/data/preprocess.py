"""Preprocessing: the text of many inputs to token files, one pair per key, complete or absent."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import chain

from tqdm import tqdm

from megalite.data.encoding import Encoded, EncodingPlan
from megalite.data.error import DataError
from megalite.data.indexed_writer import IndexedDatasetWriter
from megalite.data.input_block import InputBlock
from megalite.data.sources import Source, total_bytes
from megalite.data.workers import encode_in_order


@dataclass
class BadRecords:
    """The records that are left out: how many, and which was the first; DataError above `allowed`."""

    allowed: int = 0
    count: int = 0
    first: str = ""
    _name: str = ""
    _before: int = 0  # records of that input so far

    def add(self, block: InputBlock, encoded: Encoded) -> None:
        """Count the bad records of a block; blocks come in the order of the input."""
        if block.name != self._name:
            self._name, self._before = block.name, 0
        self.count += len(encoded.bad_records)
        if encoded.bad_records and not self.first:
            record, reason = encoded.bad_records[0]
            self.first = f"{block.name} {block.unit} {self._before + record}: {reason}"
        self._before += encoded.num_records
        if self.count > self.allowed:
            limit = f"more than --max-bad-records {self.allowed}"
            raise DataError(f"{self.first} ({limit}: repair the input, or allow more)")


@dataclass
class Job:
    """What to read, how to encode it, and the prefix to write per key of the plan."""

    plan: EncodingPlan
    sources: Sequence[Source]
    prefixes: Sequence[str]
    workers: int = 0
    bad_records: BadRecords = field(default_factory=BadRecords)


def preprocess(job: Job, progress: bool = False) -> list[IndexedDatasetWriter]:
    """Write one dataset per key; returns their writers, with what they counted.

    Raises DataError for what cannot be read, too many bad records, an id outside the vocabulary, or no token.
    """
    plan, inputs = job.plan, job.sources
    blocks = chain.from_iterable(source.blocks(plan.max_record_bytes) for source in inputs)
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedDatasetWriter(prefix, plan.dtype)) for prefix in job.prefixes]
        encoded_blocks = stack.enter_context(closing(encode_in_order(plan, blocks, job.workers)))
        bar = tqdm(
            total=total_bytes(inputs), desc="tokenize", unit="B", unit_scale=True, disable=not progress
        )
        stack.enter_context(bar)
        for block, encoded in encoded_blocks:
            job.bad_records.add(block, encoded)
            for writer, (tokens, lengths) in zip(writers, encoded.rows, strict=True):
                writer.add_documents(tokens, lengths)
            bar.set_postfix_str(_pace(bar, writers, job.bad_records), refresh=False)
            bar.update(block.num_bytes)
        for writer in writers:
            if writer.num_tokens == 0:
                raise DataError(f"{writer.prefix}: no tokens in {len(inputs)} inputs: nothing was written")
    return writers


def _pace(bar: tqdm, writers: list[IndexedDatasetWriter], bad_records: BadRecords) -> str:
    num_tokens = sum(writer.num_tokens for writer in writers)
    rate = num_tokens / max(bar.format_dict["elapsed"], 1e-9)
    bad = f", {bad_records.count:,} bad records" if bad_records.count else ""
    return f"{num_tokens:,} tokens, {rate:,.0f} tokens/s{bad}"
