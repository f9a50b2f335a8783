"""Section `data`: which tokens, and how they become samples."""

from typing import Any

from pydantic import Field, field_validator

from megalite.config.section import PositiveInt, Section


class DataConfig(Section):
    """Where the tokens come from, and how they become samples."""

    train: list[str] | None = Field(
        None,
        description="Prefixes of the .bin and .idx files to train on, mixed by their sizes, or weight and "
        "prefix in turn; null means the source of Python's own standard library, as bytes.",
    )
    validation: list[str] | None = Field(
        None,
        description="The same for validation; null means a part of `train`, by `split`.",
    )
    seq_length: PositiveInt = Field(128, description="Length of one sample, in tokens.")
    mask_documents: bool = Field(
        False,
        description="Whether attention stays within each sequence of the token files (a document, as our "
        "tools write them), and positions restart there.",
    )
    split: str = Field("969,30,1", description="Weights of training, validation and test within `train`.")
    tokenizer: str | None = Field(
        None, description="Tokenizer folder or file that goes with the data into exports."
    )
    cache_dir: str | None = Field(
        None,
        description="Folder that keeps shuffled indices; null means `cache` beside the first training file.",
    )
    chat_template: str | None = Field(
        None,
        description="Fine-tuning: how conversations become text: a Jinja file, or the name of a template of "
        "ours; null means the tokenizer's own.",
    )
    packing: bool = Field(
        True,
        description="Fine-tuning: whether conversations share a sample, each attending to itself alone.",
    )
    allow_other_data: bool = Field(
        False,
        description="Whether to resume from a checkpoint even where its place in these data is not known, as "
        "if the run had read them from its beginning.",
    )

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        """One prefix is a list of one; weights are kept as they were written."""
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list):
            return items
        return [repr(item) if type(item) in (int, float) else item for item in items]

    @field_validator("train", "validation")
    @classmethod
    def _at_least_one_prefix(cls, value: list[str] | None) -> list[str] | None:
        if value == []:
            raise ValueError("no prefix given, expected at least 1: name a .bin/.idx pair, or write null")
        return value

    @field_validator("split")
    @classmethod
    def _three_weights(cls, value: str) -> str:
        try:
            weights = [float(part) for part in value.split(",")]
        except ValueError:
            weights = []
        if len(weights) != 3 or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise ValueError(f"{value!r} is not three weights like '969,30,1': training, validation, test")
        return value
