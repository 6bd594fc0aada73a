"""Stage tune: adapters and quantization ranges learn the distribution of the uncompressed model, or a task; elastic
adapters' ranks are chosen."""

from ovexport.tune.loop import Tuned, check_device, device_of, tune
from ovexport.tune.tuner import arithmetic

__all__ = ["Tuned", "arithmetic", "check_device", "device_of", "tune"]
