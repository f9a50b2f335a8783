"""Whether transformers reads a saved tokenizer as the same."""

from pathlib import Path

from megalite.tokenizer.tokenizer import Tokenizer

TEXTS = (
    "def f(x: int) -> float:\n    return 3.14159 * x ** 2  # it's 1234567890\n\n",
    "It's the dogs' day; they'll say \u201cno\u201d, I'M sure.",
    " two  spaces,\ttabs\tand\r\n\n  ends ",
    "\u00e9t\u00e9 \u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439 e\u0301 \ufb01",
)


def find_misreading(folder: Path, tokenizer: Tokenizer) -> str | None:
    """What is wrong with the ids that AutoTokenizer gives from a folder, in one line; None when nothing is.

    tokenizer: what was saved there, beside a model's config.json. For some families AutoTokenizer of
    transformers 5 takes a class of its own, which cuts words in its own way: Qwen2's is one.
    """
    import transformers  # slow to import

    loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in TEXTS:
        if loaded(text, add_special_tokens=False)["input_ids"] != tokenizer.encode(text):
            return (
                f"AutoTokenizer of transformers {transformers.__version__} reads {folder} as "
                f"{type(loaded).__name__}, which gives {text!r} other ids than the model was trained with: "
                "load it with PreTrainedTokenizerFast"
            )
    return None
