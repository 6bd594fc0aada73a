"""First line of evidence: the codes computed again, in NumPy, from the checkpoint and the weights of the base IR.

Written from the formulas in README.md, sharing nothing with the code that trains and packs. A block of rows is in
memory at a time, small enough for a core's cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovexport.errors import ArtifactError
from ovexport.storage.tensorfile import TensorFile
from ovexport.verify.modes import storage
from ovexport.weights.layer import LayerFormat

_SMALLEST, _LARGEST = np.float32(2.0**-24), np.float32(65504.0)
_BLOCK_ELEMENTS = 2**17


@dataclass(frozen=True, slots=True)
class ExpectedGrid:
    """Scale float16 and zero point, uint8 or float16, (output, groups); the zero point None where symmetric."""

    scale: NDArray[np.float16]
    zero_point: NDArray[np.uint8] | NDArray[np.float16] | None


def expected_grid(layer: LayerFormat, adapters: TensorFile) -> ExpectedGrid:
    """The scales and zero points of a layer, as they ship.

    QA-LoRA's adapter shifts each zero point by -D / scale, with D = factor · B·A summed in float64; the sum is rounded
    to float32, and from there to float16 or to a code.

    Raises:
        ArtifactError: the checkpoint lacks a tensor of the layer, or holds one of another shape or not finite.
    """
    grid = base_grid(layer, adapters)
    if grid.zero_point is None:
        return grid
    zero_point = grid.zero_point.astype(np.float64)
    if layer.adapter == "qalora" and layer.rank:
        down = stored_tensor(layer, adapters, "lora_A", (layer.rank, layer.groups)).astype(np.float64)
        up = stored_tensor(layer, adapters, "lora_B", (layer.out_features, layer.rank)).astype(np.float64)
        zero_point -= up @ down * layer.adapter_factor / grid.scale.astype(np.float64)
    rounded = zero_point.astype(np.float32)
    if storage(layer).zero_point_bits == 16:
        return ExpectedGrid(grid.scale, np.clip(rounded, -_LARGEST, _LARGEST).astype(np.float16))
    return ExpectedGrid(grid.scale, np.clip(np.rint(rounded), 0, storage(layer).highest).astype(np.uint8))


def base_grid(layer: LayerFormat, adapters: TensorFile) -> ExpectedGrid:
    """The scales and zero points that a layer's codes are rounded with.

    Raises:
        ArtifactError: the checkpoint lacks a tensor of the layer, or holds one of another shape or not finite.
    """
    stored = storage(layer)
    if stored.symmetric:
        return ExpectedGrid(_float16_grid(stored_ranges(layer, adapters, "scale") / np.float32(-stored.lowest)), None)
    top = np.float32(stored.highest)
    scale = _float16_grid((np.abs(stored_ranges(layer, adapters, "input_range")) / top).astype(np.float32))
    zero_point = np.clip(np.round(-stored_ranges(layer, adapters, "input_low") / scale.astype(np.float32)), 0, top)
    return ExpectedGrid(scale, zero_point.astype(np.uint8))


class ExpectedCodes:
    """The codes of a layer, computed for some rows at a time.

    Raises:
        ArtifactError: the checkpoint lacks a tensor of the layer, or holds one of another shape or not finite.
    """

    def __init__(self, layer: LayerFormat, adapters: TensorFile) -> None:
        self._layer = layer
        grid = base_grid(layer, adapters)
        self._scale = grid.scale.astype(np.float32)[..., None]
        self._zero_point = None if grid.zero_point is None else grid.zero_point.astype(np.float32)[..., None]
        rank = layer.used_rank if layer.adapter == "lora" else 0  # others leave the codes alone
        up, down = (layer.out_features, layer.rank), (layer.rank, layer.in_features)
        self._down = stored_tensor(layer, adapters, "lora_A", down)[:rank].astype(np.float64) if rank else None
        self._up = stored_tensor(layer, adapters, "lora_B", up)[:, :rank] if rank else None

    def rows(self, weight: NDArray[np.float32], rows: slice) -> NDArray[np.generic]:
        """Codes of some rows, (rows, input), uint8, or int8 where symmetric.

        Args:
            weight: these rows of W, (rows, input) float32; it is overwritten.
        """
        layer = self._layer
        if self._down is not None and self._up is not None:
            weight += (self._up[rows].astype(np.float64) @ self._down).astype(np.float32)
        values = weight.reshape(-1, layer.groups, layer.group_size)
        np.divide(values, self._scale[rows], out=values)
        np.rint(values, out=values)
        if self._zero_point is not None:
            np.add(values, self._zero_point[rows], out=values)
        stored = storage(layer)
        np.clip(values, stored.lowest, stored.highest, out=values)
        return values.astype(np.int8 if stored.symmetric else np.uint8).reshape(-1, layer.in_features)


def row_blocks(layer: LayerFormat) -> Iterator[slice]:
    """A layer's rows, in blocks with an even number of codes but for the last."""
    height = 2 * max(1, _BLOCK_ELEMENTS // layer.in_features // 2)
    return (slice(begin, begin + height) for begin in range(0, layer.out_features, height))


def stored_ranges(layer: LayerFormat, adapters: TensorFile, name: str) -> NDArray[np.float32]:
    """A parameter of each group, (output, groups).

    Raises:
        ArtifactError: as stored_tensor.
    """
    return stored_tensor(layer, adapters, name, (layer.out_features, layer.groups, 1))[..., 0]


def stored_tensor(layer: LayerFormat, adapters: TensorFile, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A tensor of a layer in the checkpoint.

    Raises:
        ArtifactError: it is missing, of another shape or not finite.
    """
    values = adapters.require(f"{layer.name}.{name}")
    if values.shape != shape:
        raise ArtifactError(f"{layer.name}.{name}: shape {values.shape}, {shape} by checkpoint.json; tune again")
    with np.errstate(over="ignore"):
        floats = values.astype(np.float32)
    if not np.isfinite(floats).all():
        raise ArtifactError(f"{layer.name}.{name}: holds values that are not finite; tune again")
    return floats


def _float16_grid(step: NDArray[np.float32]) -> NDArray[np.float16]:
    magnitude = np.clip(np.abs(step), _SMALLEST, _LARGEST)
    return np.where(step < 0, -magnitude, magnitude).astype(np.float16)
