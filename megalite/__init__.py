"""Megatron-style model parallelism for Llama decoders under DeepSpeed."""

__version__ = "0.1.0"
