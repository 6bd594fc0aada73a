"""AWQ, as AutoAWQ writes it for its kernel "gemm".

    qweight  (input, output / 8) int32    eight outputs to a word, interleaved
    qzeros   (groups, output / 8) int32   the same
    scales   (groups, output) float16

From the lowest bits up, a word holds the outputs 0, 2, 4, 6, 1, 3, 5 and 7 of its eight.

Source: AutoAWQ's documentation, and files on the hub.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovexport.errors import UnsupportedModelError
from ovexport.models.packed.format import Shape, Tensors, packed_formats, require_value, sizes_in
from ovexport.models.packed.grid import PackedGrid, make_grid, unpacked_columns

_INTERLEAVED = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class AwqLayout:
    """The layout of AWQ's "gemm"."""

    codes_name: str = "qweight"

    def matrix_shapes(self, codes: Shape) -> tuple[Shape, Shape]:
        """As Layout."""
        return (8 * codes[1], codes[0]), (8 * codes[1], codes[0])

    def groups(self, tensors: Tensors) -> int:
        """As Layout."""
        return int(tensors["scales"].shape[0])

    def required(self, outputs: int, inputs: int, groups: int) -> dict[str, Shape]:
        """As Layout."""
        return {"qweight": (inputs, outputs // 8), "qzeros": (groups, outputs // 8), "scales": (groups, outputs)}

    def optional(self, outputs: int, inputs: int, groups: int) -> dict[str, Shape]:
        """As Layout."""
        return {"bias": (outputs,)}

    def codes(self, tensors: Tensors, shape: tuple[int, int]) -> NDArray[np.uint8]:
        """As Layout."""
        return np.ascontiguousarray(unpacked_columns(tensors["qweight"], _INTERLEAVED).T)

    def grid(self, name: str, tensors: Tensors, shape: tuple[int, int]) -> PackedGrid:
        """As Layout."""
        return make_grid(name, tensors["scales"].T, unpacked_columns(tensors["qzeros"], _INTERLEAVED).T, None)


@packed_formats.register("awq")
class Awq:
    """AWQ in the layout of its kernel "gemm"."""

    title = "AWQ"

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """As PackedFormat."""
        return config.get("quant_method") == "awq"

    def layout(self, config: Mapping[str, Any]) -> AwqLayout:
        """As PackedFormat."""
        key = "bits" if "bits" in config else "w_bit"
        require_value(config, key, 4)
        key = next((key for key in ("version", "checkpoint_format", "format") if config.get(key)), "version")
        version = config.get(key, "gemm")
        if str(version).lower() != "gemm":
            raise UnsupportedModelError(f"has {key}={version!r:.60}, and only 'gemm' can be read")
        return AwqLayout()

    def group_sizes(self, config: Mapping[str, Any]) -> frozenset[int]:
        """As PackedFormat."""
        return sizes_in(config, {"group_size": config.get("q_group_size")})
