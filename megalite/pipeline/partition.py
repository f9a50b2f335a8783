"""Which layers live on which pipeline stage (pure arithmetic)."""

from collections.abc import Sequence


def layers_of_stage(
    num_layers: int, num_stages: int, stage: int, *, sizes: Sequence[int] | None = None
) -> range:
    """The contiguous layers of one stage; stages differ by at most one layer, unless their sizes are given.

    Layers that do not divide evenly go one each to the stages that hold neither embedding nor head, the
    earliest first; then to the first stage, since the embedding is a lookup and the head a matrix product.

    sizes: layers of each stage, in their order, which add up to num_layers.

    Raises ValueError if there are fewer layers than stages, if the stage does not exist, or if the
    sizes are of other stages or layers.
    """
    if not 0 <= stage < num_stages:
        raise ValueError(f"stage {stage} does not exist in a pipeline of {num_stages}: stages count from 0")
    if num_layers < num_stages:
        raise ValueError(
            f"{num_layers} layers cannot fill {num_stages} pipeline stages: "
            f"set parallel.pp_size to at most {num_layers} or add layers"
        )
    if sizes is None:
        sizes = _even_sizes(num_layers, num_stages)
    if len(sizes) != num_stages or sum(sizes) != num_layers:
        raise ValueError(
            f"layers per stage {list(sizes)} are {len(sizes)} stages and {sum(sizes)} layers: expected "
            f"{num_stages} and {num_layers}"
        )
    start = sum(sizes[:stage])
    return range(start, start + sizes[stage])


def _even_sizes(num_layers: int, num_stages: int) -> list[int]:
    smallest, remainder = divmod(num_layers, num_stages)
    favoured = [*range(1, num_stages - 1), 0][:remainder]
    return [smallest + (stage in favoured) for stage in range(num_stages)]
