"""The comparison with transformers that ends a conversion, where memory allows."""

import sys
from collections.abc import Callable

import psutil

from megalite.checkpoint.verification import Verification, bytes_needed
from megalite.config.model import ModelConfig


def prove(verify: Callable[[], Verification], model: ModelConfig, wanted: bool | None, about: str) -> int:
    """Verify if asked to, or if it fits and nothing was said, and say what was found; 0 unless that is wrong.

    about: what does not agree with what, if they do not. Neither is touched.
    """
    needed, free = bytes_needed(model), psutil.virtual_memory().available
    if wanted is None and needed > free:
        print(f"not verified: that needs {needed:,} bytes of memory, {free:,} are free", file=sys.stderr)
        return 0
    if wanted is False:
        return 0
    found = verify()
    print(found)
    if not found.holds:
        print(f"error: {about}", file=sys.stderr)
    return 0 if found.holds else 1
