"""Stage tune: adapters and quantization ranges learn the distribution of the uncompressed model (distillation)."""

from ovexport.tune.loop import tune

__all__ = ["tune"]
