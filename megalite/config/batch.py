"""The three batch sizes of a DeepSpeed JSON: any that suffice give the others, as DeepSpeed derives them."""

from pydantic import Field

from megalite.config.section import ConfigError, PositiveInt, Section


class BatchSizes(Section):
    """batch = micro batch x accumulation steps x data-parallel ranks; None follows from the others."""

    train_batch_size: PositiveInt | None = Field(
        None, description="Samples in one optimizer step, over all ranks."
    )
    train_micro_batch_size_per_gpu: PositiveInt | None = Field(
        None, description="Samples in one forward of one data-parallel rank."
    )
    gradient_accumulation_steps: PositiveInt | None = Field(
        None, description="Micro batches in one optimizer step of one data-parallel rank."
    )

    def derived(self, dp_size: int | None, where: str) -> tuple[int, int]:
        """(samples of an optimizer step, samples of a micro batch), among `dp_size` data-parallel ranks.

        dp_size: None where it is not known; then both must be stated. where: only named in messages. With
        either alone, a step is one micro batch. Raises ConfigError when too few are stated, or they do not
        divide.
        """
        batch, micro = self.train_batch_size, self.train_micro_batch_size_per_gpu
        if batch is not None and micro is not None:
            return batch, micro
        if batch is None and micro is None:
            raise ConfigError(
                f"neither train_batch_size nor train_micro_batch_size_per_gpu is a number in {where}: "
                f"state at least one, nothing else decides it"
            )
        missing = "train_batch_size" if batch is None else "train_micro_batch_size_per_gpu"
        if dp_size is None:
            raise ConfigError(
                f"{missing} follows from the number of data-parallel ranks, which is not known before the "
                f"launch: state it in {where}"
            )
        share = (self.gradient_accumulation_steps or 1) * dp_size  # micro batches of a step, over all ranks
        if micro is not None:
            return micro * share, micro
        assert batch is not None
        return batch, self._split(batch, share, dp_size, where)

    def _split(self, batch: int, share: int, dp_size: int, where: str) -> int:
        if batch % share:
            steps = self.gradient_accumulation_steps
            divisor = f"{dp_size} data-parallel ranks"
            if steps:
                divisor = f"gradient_accumulation_steps {steps} x {divisor} = {share}"
            raise ConfigError(
                f"train_batch_size {batch} is not divisible by {divisor}: change one of them in {where}"
            )
        return batch // share
