"""First line of evidence: the codes computed again, in NumPy, from the checkpoint and the weights of the base IR.

Written from the formulas in the README, sharing nothing with the code that trains and packs. One layer is in memory at
a time.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovexport.artifacts import LayerFormat
from ovexport.tensorfile import TensorFile

_SMALLEST, _LARGEST = np.float32(2.0**-24), np.float32(65504.0)


@dataclass(frozen=True, slots=True)
class ExpectedCodes:
    """Codes (output, input), scale and zero point (output, groups); the zero point None where symmetric."""

    codes: NDArray[np.generic]
    scale: NDArray[np.float16]
    zero_point: NDArray[np.uint8] | None


def expected_codes(layer: LayerFormat, weight: NDArray[np.float32], adapters: TensorFile) -> ExpectedCodes:
    """The codes of one layer.

    Args:
        weight: (output, input) float32.

    Raises:
        ArtifactError: the checkpoint lacks a tensor of the layer.
    """
    rows, groups = layer.out_features, layer.groups
    rank = layer.used_rank
    if rank:
        up = adapters.require(f"{layer.name}.lora_B")[:, :rank].astype(np.float64)
        down = adapters.require(f"{layer.name}.lora_A")[:rank].astype(np.float64)
        weight = weight + (up @ down).astype(np.float32)
    grouped = weight.reshape(rows, groups, layer.group_size)
    if layer.mode == "int4_sym":
        scale = _float16_grid(_floats(adapters, f"{layer.name}.scale", (rows, groups)) / np.float32(8))
        codes = np.clip(np.round(grouped / scale[..., None]), -8, 7).astype(np.int8)
        return ExpectedCodes(codes.reshape(rows, -1), scale.astype(np.float16), None)
    top = np.float32({"int4_asym": 15, "int8_asym": 255}[layer.mode])
    span = np.abs(_floats(adapters, f"{layer.name}.input_range", (rows, groups)))
    low = _floats(adapters, f"{layer.name}.input_low", (rows, groups))
    scale = _float16_grid((span / top).astype(np.float32))
    zero_point = np.clip(np.round(-low / scale), 0, top)
    codes = np.clip(np.round(grouped / scale[..., None]) + zero_point[..., None], 0, top)
    return ExpectedCodes(
        codes.astype(np.uint8).reshape(rows, -1), scale.astype(np.float16), zero_point.astype(np.uint8)
    )


def _floats(adapters: TensorFile, name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    return adapters.require(name).astype(np.float32).reshape(shape)


def _float16_grid(step: NDArray[np.float32]) -> NDArray[np.float32]:
    magnitude = np.clip(np.abs(step), _SMALLEST, _LARGEST)
    return np.where(step < 0, -magnitude, magnitude).astype(np.float16).astype(np.float32)
