"""A device and what joins it to others, as a YAML file: what a plan on paper reckons with."""

from pathlib import Path

from pydantic import Field, ValidationError

from megalite.config.dialect import read_yaml, write_yaml
from megalite.config.section import (
    ConfigError,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    explain,
)


class DeviceConfig(Section):
    """One device of a node. GB are 10^9 bytes, GiB 2^30; speeds of links count one direction."""

    name: str = Field(description="Device, for people.")
    peak_tflops: PositiveFloat = Field(description="Dense matrix products in bf16 or fp16, in TFLOP/s.")
    peak_tflops_fp32: PositiveFloat = Field(description="The same in fp32, in TFLOP/s.")
    memory_gib: PositiveFloat = Field(description="Memory, in GiB.")
    memory_gb_per_second: PositiveFloat = Field(description="Bandwidth of that memory, in GB/s.")
    link_gb_per_second: PositiveFloat = Field(description="From a device to others of its node, in GB/s.")
    network_gb_per_second: PositiveFloat = Field(description="From a device to other nodes, in GB/s.")
    storage_gb_per_second_per_node: PositiveFloat = Field(
        2.0, description="Writing a checkpoint, in GB/s per node."
    )
    storage_gb_per_second: PositiveFloat = Field(
        200.0, description="What the shared store takes from all nodes together, in GB/s."
    )
    matmul_efficiency: PositiveFloat = Field(
        0.7, le=1, description="Share of the peak that large matrix products reach."
    )
    expert_efficiency: PositiveFloat = Field(
        0.6, le=1, description="Share of that which the grouped products of routed experts reach."
    )
    elementwise_bytes: NonNegativeFloat = Field(
        244.0,
        description="Moved for all that is no matrix product, in forward and backward: bytes per token, "
        "layer and feature of hidden_size, in bf16.",
    )
    communication_efficiency: PositiveFloat = Field(
        0.8, le=1, description="Share of the links' bandwidth that collectives reach."
    )
    link_latency_seconds: NonNegativeFloat = Field(5e-6, description="Of a hop within a node, in seconds.")
    network_latency_seconds: NonNegativeFloat = Field(1e-5, description="Of a hop between nodes, in seconds.")
    overlap: float = Field(
        0.7, ge=0, le=1, description="Share of communication hidden where computation could hide it."
    )
    memory_reserve: float = Field(
        0.08, ge=0, lt=1, description="Share of the memory that plans leave free: libraries, fragmentation."
    )
    layer_seconds: NonNegativeFloat = Field(
        0.0, description="Beside the products, per layer, micro batch and pass, in seconds."
    )
    zero3_layer_seconds: NonNegativeFloat = Field(
        0.0,
        description="ZeRO-3: letting weights come and go, per layer and time that they are gathered, in "
        "seconds; none where a GPU computes meanwhile.",
    )
    step_seconds: NonNegativeFloat = Field(
        0.0, description="Beside the rest, per optimizer step, in seconds."
    )
    optimizer_bytes: PositiveFloat = Field(
        34.0, description="Moved by the optimizer, in bytes per parameter that a rank steps."
    )
    processors_per_node: PositiveInt | None = Field(
        None, description="Processors that the ranks of a node share; null means one for each rank."
    )
    hours_between_failures: PositiveFloat = Field(
        50_000.0, description="Mean time between failures that stop a job, in hours of one device."
    )

    def flops_per_second(self, precision: str) -> float:
        """What large matrix products reach, by the number format of the weights."""
        peak = self.peak_tflops_fp32 if precision == "fp32" else self.peak_tflops
        return peak * 1e12 * self.matmul_efficiency


def load_device(path: str | Path) -> DeviceConfig:
    """Read a device's YAML. Raises ConfigError, in one line, where it is missing or wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(sorted(known.stem for known in Path(path).parent.glob("*.yaml")))
        beside = f": known beside it are {known}" if known else f": {error}"
        raise ConfigError(f"device {Path(path).stem} is not to be read at {path}{beside}") from None
    value = read_yaml(text, str(path))
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {value!r}: expected lines 'key: value' of a device")
    try:
        return DeviceConfig.model_validate(value)
    except ValidationError as error:
        raise ConfigError(explain(error, default=f"in {path}")) from None


def dump_device(device: DeviceConfig) -> str:
    """A device as YAML that `load_device` reads back."""
    return write_yaml(device.model_dump())
