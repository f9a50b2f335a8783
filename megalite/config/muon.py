"""How Muon orthogonalises updates: a section of its own, which other optimizers leave as it is."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megalite.config.section import PositiveFloat, PositiveInt, Section

CoefficientSet = Literal["classic", "quintic", "polar_express"]
# set -> the triples (a, b, c) of its iterations; one triple serves any number of them
COEFFICIENTS: dict[CoefficientSet, tuple[tuple[float, float, float], ...]] = {
    # Jordan 2024, https://kellerjordan.github.io/posts/muon/
    "classic": ((3.4445, -4.7750, 2.0315),),
    # NVIDIA's Emerging-Optimizers
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Amsel 2025, arXiv 2505.16932, with nanochat's margin
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}

# section of the DeepSpeed JSON -> keys under which masters are elsewhere, cut otherwise, or not fp32
NOT_WITH_MUON = {
    "zero_optimization": ("offload_optimizer", "offload_param", "cpu_offload", "zenflow", "mics_shard_size"),
    "bf16": ("bf16_master_weights_and_grads",),
    "fp16": ("fp16_master_weights_and_grads",),
}


class MuonConfig(Section):
    """Muon's own settings: hidden matrices get orthogonalised momentum, all else AdamW (arXiv 2502.16982)."""

    momentum: float = Field(0.95, ge=0, lt=1, description="Decay of the gradient's running mean, per step.")
    nesterov: bool = Field(True, description="Whether the update looks ahead by the newest gradient.")
    scale: Literal["match_rms", "original", "unit_rms"] = Field(
        "match_rms",
        description="Factor of the orthogonal update of an [out, in] matrix: 0.2 sqrt(max(out, in)), as "
        "large as AdamW's, whose rates then fit; sqrt(max(1, out / in)); or sqrt(out / in).",
    )
    coefficients: CoefficientSet = Field(
        "classic", description="Coefficients of the Newton-Schulz iterations."
    )
    num_iterations: PositiveInt = Field(5, description="Number of Newton-Schulz iterations.")
    iteration_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Number format of the iterations; bf16 is faster on GPUs and rounds to 8 bits."
    )
    exchange: Literal["owner", "gather"] = Field(
        "owner",
        description="Where a matrix is made whole: on one rank of the stage, the loads balanced, or on all "
        "that hold a part of it. Both give the same bits.",
    )
    adamw_learning_rate_factor: PositiveFloat = Field(
        1.0, description="Learning rate of what AdamW steps, as a multiple of the matrices'."
    )

    qk_clip: PositiveFloat | None = Field(
        None,
        description="Largest attention logit: the query rows of a head that exceeds it in a step are scaled "
        "down after the step (QK-clip, arXiv 2507.20534); null means none. The paper's is 100.",
    )

    @model_validator(mode="after")
    def _iterations_have_coefficients(self) -> Self:
        known = len(COEFFICIENTS[self.coefficients])
        if 1 < known < self.num_iterations:
            raise ValueError(
                f"num_iterations {self.num_iterations} exceeds the {known} that coefficients "
                f"{self.coefficients!r} are made for: use at most {known}, or coefficients 'classic'"
            )
        return self
