"""Which layers live on which pipeline stage (pure arithmetic)."""


def layers_of_stage(num_layers: int, num_stages: int, stage: int) -> range:
    """The contiguous layers of one stage; stages differ by at most one layer.

    Layers that do not divide evenly go one each to the stages that hold neither embedding nor head, the
    earliest first; then to the first stage, since the embedding is a lookup and the head a matrix product.

    Raises ValueError if there are fewer layers than stages, or if the stage does not exist.
    """
    if not 0 <= stage < num_stages:
        raise ValueError(f"stage {stage} does not exist in a pipeline of {num_stages}: stages count from 0")
    if num_layers < num_stages:
        raise ValueError(
            f"{num_layers} layers cannot fill {num_stages} pipeline stages: "
            f"set parallel.pp_size to at most {num_layers} or add layers"
        )
    smallest, remainder = divmod(num_layers, num_stages)
    favoured = [*range(1, num_stages - 1), 0][:remainder]
    start = stage * smallest + sum(other < stage for other in favoured)
    return range(start, start + smallest + (stage in favoured))
