"""The first line of evidence for a checkpoint of NNCF's: the codes computed again, in NumPy, by NNCF's rules.

Written from the formulas in README.md, sharing nothing with the code that packs. Every operation is one of float32, in
NNCF's order, so that the result is equal to the last bit; only the product of the adapters is summed in float64. Where
torch rounded that to another bfloat16, the checkpoint names the entry; that it may be one is checked.
"""

import numpy as np
from numpy.typing import NDArray

from ovexport.errors import ArtifactError
from ovexport.storage.tensorfile import TensorFile
from ovexport.verify.arithmetic import ExpectedGrid, stored_ranges, stored_tensor
from ovexport.verify.modes import storage
from ovexport.weights.layer import LayerFormat

_SMALLEST = np.float32(2.0**-23)
_SMALLEST_RANGE = 1e-17  # NNCF adds 1e-16 to each


def nncf_grid(layer: LayerFormat, adapters: TensorFile) -> ExpectedGrid:
    """The scales and zero points of a layer, as they ship.

    Raises:
        ArtifactError: the checkpoint lacks a tensor of the layer, or holds one of another shape or not finite.
    """
    step, zero_point = _grid(layer, adapters)
    with np.errstate(over="ignore"):
        return ExpectedGrid(step.astype(np.float16), None if storage(layer).symmetric else zero_point.astype(np.uint8))


class NncfCodes:
    """The codes of a layer, computed for some rows at a time.

    Raises:
        ArtifactError: the checkpoint lacks a tensor of the layer, or holds one that NNCF can't have written.
    """

    def __init__(self, layer: LayerFormat, adapters: TensorFile) -> None:
        self._layer = layer
        self._step, self._zero_point = (values[..., None] for values in _grid(layer, adapters))
        self._low = stored_ranges(layer, adapters, "input_low")[..., None]
        self._range = stored_ranges(layer, adapters, "input_range")[..., None]
        if (self._range < _SMALLEST_RANGE).any():
            raise ArtifactError(
                f"{layer.name}.input_range: below {_SMALLEST_RANGE}, and NNCF's are not; convert NNCF's file again"
            )
        self._product = _Product(layer, adapters) if layer.rank else None

    def rows(self, weight: NDArray[np.float32], rows: slice) -> NDArray[np.generic]:
        """Codes of some rows, (rows, input), uint8, or int8 where symmetric.

        Args:
            weight: these rows of W, (rows, input) float32; it is overwritten.
        """
        layer = self._layer
        if self._product is not None:
            weight += self._product.rows(rows)
        low, width = self._low[rows], self._range[rows]
        stored = storage(layer)
        steps = np.float32(stored.highest - stored.lowest)
        inverse = np.float32(1) / width * steps if stored.bits == 4 else steps / width
        values = weight.reshape(-1, layer.groups, layer.group_size)
        np.clip(values, low, low + width, out=values)
        values -= low
        values *= inverse
        values -= np.rint(-low * inverse)
        np.rint(values, out=values)
        values /= inverse
        values /= self._step[rows]
        values += self._zero_point[rows]
        np.rint(values, out=values)
        np.clip(values, stored.lowest, stored.highest, out=values)
        return values.astype(np.int8 if stored.symmetric else np.uint8).reshape(-1, layer.in_features)


class _Product:
    """B·A of a layer's adapter as torch summed it.

    Raises:
        ArtifactError: as NncfCodes.
    """

    def __init__(self, layer: LayerFormat, adapters: TensorFile) -> None:
        self._layer = layer
        rank = layer.used_rank
        self._down = stored_tensor(layer, adapters, "lora_A", (layer.rank, layer.in_features))[:rank].astype(np.float64)
        self._up = stored_tensor(layer, adapters, "lora_B", (layer.out_features, layer.rank))[:, :rank]
        self._positions = adapters.require(f"{layer.name}.product_positions")
        self._values = stored_tensor(layer, adapters, "product_values", self._positions.shape)
        if self._positions.ndim != 1 or self._positions.dtype != np.int64 or (np.diff(self._positions) <= 0).any():
            raise ArtifactError(f"{layer.name}.product_positions: no rising whole numbers; convert NNCF's file again")

    def rows(self, rows: slice) -> NDArray[np.float32]:
        """Some rows of it, (rows, input).

        Raises:
            ArtifactError: an entry that the checkpoint names is no sum that torch can have come to.
        """
        up = self._up[rows].astype(np.float64)
        exact = up @ self._down
        product = _bfloat16(exact.astype(np.float32))
        width = self._layer.in_features
        begin, end = np.searchsorted(self._positions, (rows.start * width, rows.start * width + exact.size))
        row, column = np.divmod(self._positions[begin:end] - rows.start * width, width)
        given = self._values[begin:end]
        sizes = np.linalg.norm(up[row], axis=1) * np.linalg.norm(self._down[:, column], axis=0)
        # Twice the bound of a sum of `rank` terms in float32, rounded to bfloat16; the last term is for subnormals.
        allowed = 2**-8 * np.abs(exact[row, column]) + 2**-23 * len(self._down) * sizes + 2**-126
        wrong = np.flatnonzero((np.abs(given - exact[row, column]) > allowed) | (given != _bfloat16(given)))
        if len(wrong):
            first = wrong[0]
            raise ArtifactError(
                f"{self._layer.name}.product_values: {given[first]:.6g} for row {rows.start + row[first]}, column "
                f"{column[first]}, where B·A is {exact[row, column][first]:.6g}; convert NNCF's file again"
            )
        product[row, column] = given
        return product


def _grid(layer: LayerFormat, adapters: TensorFile) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Step and zero point, (output, groups) float32."""
    stored = storage(layer)
    if stored.symmetric:
        step = stored_ranges(layer, adapters, "scale") / np.float32(-stored.lowest)
    else:
        step = stored_ranges(layer, adapters, "input_range") / np.float32(stored.highest)
    step = np.where(np.abs(step) < _SMALLEST, _SMALLEST, step)
    if stored.symmetric:
        return step, np.zeros_like(step)
    zero_point = -np.rint(stored_ranges(layer, adapters, "input_low") / step)
    return step, np.clip(zero_point, stored.lowest, stored.highest)


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest bfloat16, ties to even, in float32."""
    bits = values.view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)).view(np.float32)
