"""Stage tune: adapters and quantization ranges learn the distribution of the uncompressed model, or a task."""

from ovexport.tune.check import check, require_tunable_norms
from ovexport.tune.loop import tune

__all__ = ["check", "require_tunable_norms", "tune"]
