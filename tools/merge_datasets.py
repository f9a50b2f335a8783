"""Several Megatron datasets to one: the documents of all, in the order given."""

import argparse
import signal
import sys

from tqdm import tqdm

from megalite.data.error import DataError
from megalite.data.indexed_dataset import IndexedDataset, bin_path
from megalite.data.indexed_writer import IndexedDatasetWriter

EPILOG = """\
Each PREFIX stands for PREFIX.bin and PREFIX.idx. All must have the same id type, and should come from the
same tokenizer, which the files do not name. The sources stay as they are.

To mix datasets in other shares than their sizes, do not merge them: give data.train weights instead, as in
data.train=[0.7,A,0.3,B].

example:
  python tools/merge_datasets.py --input data/part_*_text_document.idx --output-prefix data/all
"""


def merge(prefixes: list[str], output_prefix: str) -> IndexedDatasetWriter:
    """Check all parts, then write them; returns the writer, with what it counted."""
    parts = [IndexedDataset(prefix) for prefix in prefixes]
    output = bin_path(output_prefix)
    for part in parts:
        if output.exists() and output.samefile(bin_path(part.prefix)):
            raise DataError(f"{output_prefix}: output: expected another name than those of the inputs")
    with (
        IndexedDatasetWriter(output_prefix, parts[0].dtype) as writer,
        tqdm(
            total=sum(part.num_tokens for part in parts), desc="merge", unit="token", unit_scale=True
        ) as bar,
    ):
        for part in parts:
            writer.add_dataset(part)
            bar.update(part.num_tokens)
    return writer


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the data is written, 2 when the user can put it right."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    parts = "datasets to join, in their order; the ending .bin or .idx may be there"
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help=parts)
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin and P.idx")
    arguments = parser.parse_args(argv)
    try:
        writer = merge(arguments.input, arguments.output_prefix)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted: nothing was written", file=sys.stderr)
        return 130
    counts = f"{writer.num_documents:,} documents, {writer.num_tokens:,} tokens of {writer.dtype}"
    print(f"{writer.prefix}: {counts}, from {len(arguments.input)} datasets")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a polite kill cleans up as well
    sys.exit(main())
