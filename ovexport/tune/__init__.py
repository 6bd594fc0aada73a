"""Stage tune: adapters and quantization ranges learn the distribution of the uncompressed model (distillation)."""

from ovexport.tune.loop import check_device, check_objective, device_of, tune
from ovexport.tune.tuner import arithmetic

__all__ = ["arithmetic", "check_device", "check_objective", "device_of", "tune"]
