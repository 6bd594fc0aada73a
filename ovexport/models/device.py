"""Where a model is computed in tuning and search, and the type of its matrix products."""

from dataclasses import dataclass
from typing import Literal

import openvino as ov
import torch

from ovexport.errors import RecipeError

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

DeviceName = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, slots=True)
class Compute:
    """A device, and the type of the matrix products on it.

    Attributes:
        dtype: bfloat16 or float32; everything but products of matrices is in float32 whatever it is.
    """

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, device: DeviceName, precision: Precision) -> "Compute":
        """What a recipe asks for; "auto" is a GPU if there is one, and bfloat16 if the device is fast at it."""
        chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        if precision == "auto":
            return cls(chosen, torch.bfloat16 if _is_fast_at_bfloat16(chosen) else torch.float32)
        return cls(chosen, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])

    def autocast(self) -> torch.autocast:
        """Within, products of matrices are computed in `dtype`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def peak_memory_bytes(self) -> int | None:
        """The most that was in use so far: on a GPU what was allocated there, else the process's resident memory; None
        if the operating system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if resource else None


def require_device(device: DeviceName, key: str = "tune.device") -> None:
    """Refuse a device that this machine does not have.

    Args:
        key: of the recipe, that names it.

    Raises:
        RecipeError: it does not.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f'{key}="cuda": no CUDA device here; use "auto" or "cpu"')


def _is_fast_at_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
