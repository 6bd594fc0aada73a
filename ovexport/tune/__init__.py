"""Stage tune: adapters and quantization ranges learn the distribution of the uncompressed model (distillation)."""

from ovexport.tune.loop import check_device, check_objective, tune

__all__ = ["check_device", "check_objective", "tune"]
