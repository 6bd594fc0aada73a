"""GPTQ, as AutoGPTQ and GPTQModel write it.

    qweight  (input / 8, output) int32    eight inputs to a word, the first in the lowest bits
    qzeros   (groups, output / 8) int32   eight outputs to a word
    scales   (groups, output)
    g_idx    (input,) int32               the group of each input; left out or sorted without act-order

Version 1 stores zero points less 1, version 2 as they are. A 15 of version 1 stands for 16, which four bits can't hold
and which some kernels read as 0.

Source: GPTQModel's documentation of its configuration; vllm-project/vllm pull requests 26092 and 38966, which tell of
version 2 and of files that hold it under the name of version 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovexport.errors import ArtifactError, UnsupportedModelError
from ovexport.models.packed.format import Shape, Tensors, packed_formats, require_absent, require_value, sizes_in
from ovexport.models.packed.grid import PackedGrid, make_grid, order_of, unpacked_columns

_MIDDLE = 8


@dataclass(frozen=True, slots=True)
class GptqLayout:
    """The layout of GPTQ.

    Attributes:
        offset: what is added to a stored zero point: 1 in version 1, 0 in version 2.
        symmetric: config.json has it that every zero point is 8.
        ordered: config.json has it that there is an act-order, so that no layer may lack its own.
    """

    offset: int
    symmetric: bool
    ordered: bool = False
    codes_name: str = "qweight"

    def matrix_shapes(self, codes: Shape) -> tuple[Shape, Shape]:
        """As Layout."""
        return (codes[1], 8 * codes[0]), (codes[1], 8 * codes[0])

    def groups(self, tensors: Tensors) -> int:
        """As Layout."""
        return int(tensors["scales"].shape[0])

    def required(self, outputs: int, inputs: int, groups: int) -> dict[str, Shape]:
        """As Layout."""
        order = {"g_idx": (inputs,)} if self.ordered else {}
        return {
            "qweight": (inputs // 8, outputs),
            "qzeros": (groups, outputs // 8),
            "scales": (groups, outputs),
            **order,
        }

    def optional(self, outputs: int, inputs: int, groups: int) -> dict[str, Shape]:
        """As Layout."""
        return {"g_idx": (inputs,), "bias": (outputs,)}

    def codes(self, tensors: Tensors, shape: tuple[int, int]) -> NDArray[np.uint8]:
        """As Layout."""
        return unpacked_columns(tensors["qweight"].T)

    def grid(self, name: str, tensors: Tensors, shape: tuple[int, int]) -> PackedGrid:
        """As Layout."""
        zero_point = unpacked_columns(tensors["qzeros"]).T + np.uint8(self.offset)
        if self.symmetric and (zero_point != _MIDDLE).any():
            raise ArtifactError(
                f"{name}: is symmetric by config.json (sym), and has a zero point of "
                f"{zero_point[zero_point != _MIDDLE][0]}, not {_MIDDLE}; some tools write version 2 under the name of "
                "version 1: give checkpoint_format or packing_format the name of what the file holds"
            )
        if zero_point.max() > 15:
            raise UnsupportedModelError(
                f"{name}: has a zero point of 16 (15 stored, in version 1 of GPTQ), which tools read in two ways; save "
                "the model again with checkpoint_format gptq_v2"
            )
        order = order_of(name, tensors["g_idx"], len(tensors["scales"])) if "g_idx" in tensors else None
        return make_grid(name, tensors["scales"].T, zero_point, order)


def is_symmetric(config: Mapping[str, Any], exceptions: str) -> bool:
    """Whether a configuration has it that all layers are symmetric.

    Args:
        exceptions: the key of the layers that have settings of their own.
    """
    return config.get("sym") is True and not config.get(exceptions)


@packed_formats.register("gptq")
class Gptq:
    """GPTQ, versions 1 and 2."""

    title = "GPTQ"

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """As PackedFormat."""
        return config.get("quant_method") == "gptq"

    def layout(self, config: Mapping[str, Any]) -> GptqLayout:
        """As PackedFormat."""
        require_value(config, "bits", 4)
        require_value(config, "pack_dtype", "int32", default="int32")
        require_absent(config, "is_marlin_format", "adapter", "rotation")
        key = "checkpoint_format" if config.get("checkpoint_format") is not None else "format"
        version = require_value(config, key, "gptq", "gptq_v2", default="gptq")
        ordered = config.get("desc_act") is True
        return GptqLayout(
            offset=1 if version == "gptq" else 0, symmetric=is_symmetric(config, "dynamic"), ordered=ordered
        )

    def group_sizes(self, config: Mapping[str, Any]) -> frozenset[int]:
        """As PackedFormat."""
        return sizes_in(config)
