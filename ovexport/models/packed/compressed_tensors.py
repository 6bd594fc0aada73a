"""compressed-tensors, format "pack-quantized", as llm-compressor writes it.

    weight_packed      (output, input / 8, rounded up) int32   eight inputs to a word, the first in the lowest bits
    weight_scale       (output, groups)
    weight_zero_point  (output / 8, rounded up, groups) int32  eight outputs to a word; left out where symmetric
    weight_shape       (2,)                                    outputs and inputs
    weight_g_idx       (input,)                                the group of each input, of `actorder = "group"`

Codes and zero points are signed, -8 to 7, and stored plus 8.

Source: the compressed-tensors documentation of its formats.
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
_PACKED = "pack-quantized"


@dataclass(frozen=True, slots=True)
class PackQuantizedLayout:
    """The layout of "pack-quantized".

    Attributes:
        ordered: config.json has it that every layer has an act-order.
    """

    ordered: bool
    codes_name: str = "weight_packed"

    def matrix_shapes(self, codes: Shape) -> tuple[Shape, Shape]:
        """As Layout."""
        return (codes[0], 8 * codes[1] - 7), (codes[0], 8 * codes[1])

    def groups(self, tensors: Tensors) -> int:
        """As Layout."""
        return int(tensors["weight_scale"].shape[-1])

    def required(self, outputs: int, inputs: int, groups: int) -> dict[str, Shape]:
        """As Layout."""
        order = {"weight_g_idx": (inputs,)} if self.ordered else {}
        return {
            "weight_packed": (outputs, -(-inputs // 8)),
            "weight_scale": (outputs, groups),
            "weight_shape": (2,),
            **order,
        }

    def optional(self, outputs: int, inputs: int, groups: int) -> dict[str, Shape]:
        """As Layout."""
        return {"weight_zero_point": (-(-outputs // 8), groups), "weight_g_idx": (inputs,), "bias": (outputs,)}

    def codes(self, tensors: Tensors, shape: tuple[int, int]) -> NDArray[np.uint8]:
        """As Layout."""
        return unpacked_columns(tensors["weight_packed"])[:, : shape[1]]

    def grid(self, name: str, tensors: Tensors, shape: tuple[int, int]) -> PackedGrid:
        """As Layout."""
        stated = tensors["weight_shape"].tolist()
        if stated != list(shape):
            raise ArtifactError(f"{name}: is {stated} by its weight_shape, and the model's is {list(shape)}")
        scale = tensors["weight_scale"]
        zero_point = np.full(scale.shape, _MIDDLE, np.uint8)
        if "weight_zero_point" in tensors:
            zero_point = unpacked_columns(tensors["weight_zero_point"].T).T[: shape[0]]
        index = tensors.get("weight_g_idx")
        unset = index is None or bool((index == -1).all())  # llm-compressor's initial value
        order = None if unset or index is None else order_of(name, index, scale.shape[1])
        return make_grid(name, scale, zero_point, order)


@packed_formats.register("compressed-tensors")
class CompressedTensors:
    """compressed-tensors with weights in groups of INT4 codes."""

    title = "compressed-tensors"

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """As PackedFormat."""
        return config.get("quant_method") == "compressed-tensors"

    def layout(self, config: Mapping[str, Any]) -> PackQuantizedLayout:
        """As PackedFormat."""
        require_value(config, "format", _PACKED)
        require_value(config, "quantization_status", "compressed", default="compressed")
        require_absent(config, "kv_cache_scheme", "transform_config")
        sparsity = config.get("sparsity_config") or {}
        if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
            raise UnsupportedModelError("has sparse weights, which can't be read")
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise UnsupportedModelError("has no config_groups, which say what the codes are")
        for group in groups.values():
            self._check(group)
        return PackQuantizedLayout(
            ordered=all(group["weights"].get("actorder") == "group" for group in groups.values())
        )

    def _check(self, group: Any) -> None:
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise UnsupportedModelError("has a group without weights in its config_groups, which can't be read")
        require_value(group, "format", _PACKED, default=_PACKED)
        require_absent(group, "input_activations", "output_activations")
        weights = group["weights"]
        require_value(weights, "num_bits", 4)
        require_value(weights, "type", "int", default="int")
        require_value(weights, "strategy", "group", "channel", default="group")
        require_absent(weights, "dynamic", "block_structure")

    def group_sizes(self, config: Mapping[str, Any]) -> frozenset[int]:
        """As PackedFormat."""
        weights = [group["weights"] for group in config["config_groups"].values()]
        per_output = any(each.get("strategy") == "channel" for each in weights)
        return sizes_in(*weights) | (frozenset({-1}) if per_output else frozenset())
