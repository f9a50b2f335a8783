"""Several Megatron datasets to one: the documents of all, in the order given."""

import argparse
import signal
import sys

from megalite.data.indexed_writer import merge_datasets
from megalite.error import run_command

EPILOG = """\
Each PREFIX stands for PREFIX.bin and PREFIX.idx. All must have the same id type, and should come from the
same tokenizer, which the files do not name. The sources stay as they are.

To mix datasets in other shares than their sizes, do not merge them: give data.train weights instead, as in
data.train=[0.7,A,0.3,B].

example:
  python tools/merge_datasets.py --input data/part_*_text_document.idx --output-prefix data/all
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 when the data is written, 2 when the user can put it right."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=formatter)
    parts = "datasets to join, in their order; the ending .bin or .idx may be there"
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help=parts)
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin and P.idx")
    arguments = parser.parse_args(argv)
    return run_command(lambda: merge(arguments.input, arguments.output_prefix))


def merge(prefixes: list[str], output_prefix: str) -> None:
    """Merge with progress, and say what was written."""
    writer = merge_datasets(prefixes, output_prefix, progress=True)
    print(f"{writer.summary()}, from {len(prefixes)} datasets")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a polite kill cleans up as well
    sys.exit(main())
