"""Section `balancing`: how experts are kept equally busy."""

from typing import Literal

from pydantic import Field

from megalite.config.section import PositiveFloat, Section


class BalancingConfig(Section):
    """How experts are kept equally busy: once per optimizer step, by the tokens of the global batch."""

    rule: Literal["none", "sign", "quantile"] = Field(
        "sign",
        description="How the routers' selection biases move: not, by a fixed step (arXiv 2408.15664), or to "
        "the quantile of the scores that would have given each expert its share.",
    )
    update_rate: PositiveFloat = Field(1e-3, description="Step of the sign rule, in units of the score.")
