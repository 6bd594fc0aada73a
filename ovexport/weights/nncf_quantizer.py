"""NNCF's arithmetic, of checkpoints that were tuned with it: the very codes that its documented export packs.

That export loads the model in float32 on the CPU and calls `nncf.strip` with StripFormat.DQ, which quantizes twice: it
takes the values that the fake quantizer gives, and rounds them on the grid that ships. In float32 but for the product:

    product = bfloat16(B·A)                                as torch summed it where the file was adopted
    inverse = 15 · (1 / range)                             INT8: 255 / range
    position = clamp(W + product, low, low + range) - low
    value = round(position · inverse - round(-low · inverse)) / inverse
    step = range / 15, INT8: range / 255                   symmetric: scale / 8, scale / 128; 2^-23 where it is smaller
    zero_point = clamp(-round(low / step), 0, 15)          symmetric: none
    code = clamp(round(value / step + zero_point), 0, 15)
    shipped scale = float16(step)

`low` and `range` are what the fake quantizer clips to. Of INT8_SYM they span 255 steps of scale / 127, so its codes are
others than those of one rounding. Rounding is half to even.

How torch sums B·A depends on the machine, so an entry may be the neighbour of the exact product's bfloat16. The few
that are stand in the checkpoint with their positions; everything else follows from its other tensors.

Source: nncf 3.4, torch/quantization/strip.py, quantize_functions.py and extensions/src/quantization/cpu.
"""

from collections.abc import Iterator, Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ovexport.errors import ArtifactError
from ovexport.storage.tensorfile import TensorFile
from ovexport.weights.layer import LayerFormat
from ovexport.weights.quantizer import Codes, Rows

SMALLEST_STEP = 2.0**-23
_SMALLEST_RANGE = 1e-17  # NNCF adds 1e-16 to each
_BLOCK_ELEMENTS = 2**18


class NncfQuantizer:
    """The quantizer of one layer as an NNCF checkpoint has it; it gives codes, and is not tuned.

    Args:
        tensors: as `stored` gives them.
    """

    def __init__(self, layer: LayerFormat, tensors: Mapping[str, Tensor]) -> None:
        self.layer = layer
        self._encoding = layer.require_encoding()
        self._tensors = tensors

    @classmethod
    def load(cls, layer: LayerFormat, adapters: TensorFile) -> Self:
        """The quantizer that a checkpoint holds.

        Raises:
            ArtifactError: a tensor is missing, of another shape or not finite, or holds what NNCF can't have written.
        """
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_range_names(layer), (layer.out_features, layer.groups, 1))
        if layer.rank:
            count = adapters.require(f"{layer.name}.product_positions").size
            shapes |= {"lora_A": (layer.rank, layer.in_features), "lora_B": (layer.out_features, layer.rank)}
            shapes |= {"product_positions": (count,), "product_values": (count,)}
        tensors = {}
        for name, shape in shapes.items():
            value = np.array(adapters.require(f"{layer.name}.{name}"))
            if value.shape != shape or not np.isfinite(value).all():
                raise ArtifactError(
                    f"{layer.name}.{name}: shape {value.shape} in the checkpoint, {shape} and finite by its manifest; "
                    "the checkpoint is corrupt, convert NNCF's file again"
                )
            tensors[name] = torch.from_numpy(value)
        if layer.rank and not _rising(tensors["product_positions"], layer.out_features * layer.in_features):
            raise ArtifactError(
                f"{layer.name}.product_positions: not rising, or beyond the layer's entries; the checkpoint "
                "is corrupt, convert NNCF's file again"
            )
        if (tensors["input_range"] < _SMALLEST_RANGE).any():
            raise ArtifactError(
                f"{layer.name}.input_range: below {_SMALLEST_RANGE}, and NNCF's are not; the checkpoint is corrupt, "
                "convert NNCF's file again"
            )
        return cls(layer, tensors)

    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it.

        `input_low`, `input_range` and, where symmetric, `scale`: (output, groups, 1) float32. With an adapter `lora_A`
        (rank, input) and `lora_B` (output, rank), bfloat16 values in float32, and those entries of the product, counted
        row by row, that torch rounded to another bfloat16 than that of the exact sum: `product_positions` (count,)
        int64 and `product_values` (count,) float32.
        """
        return dict(self._tensors)

    def quantize(self, weight: Rows) -> Codes:
        """The codes that ship; of `weight`, (output, input), a block of rows is read at a time."""
        layer = self.layer
        lowest, highest = self._encoding.lowest, self._encoding.highest
        step, zero_point = self._grid()
        integer = getattr(torch, self._encoding.code_dtype)
        codes = torch.empty(layer.out_features, layer.in_features, dtype=integer)
        for rows in _blocks(layer):
            values = self._fake_quantized(weight[rows].float(), rows)
            values = values.div_(step[rows]).add_(zero_point[rows]).round_().clamp_(lowest, highest)
            codes[rows] = values.flatten(1).to(integer)
        zero_points = None if self._encoding.symmetric else zero_point.to(integer)
        return Codes(codes=codes, scale=step.half(), zero_point=zero_points)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Step and zero point, (output, groups, 1) float32."""
        lowest, highest, symmetric = self._encoding.lowest, self._encoding.highest, self._encoding.symmetric
        step = self._tensors["scale"] / -lowest if symmetric else self._tensors["input_range"] / highest
        step = torch.where(step.abs() < SMALLEST_STEP, SMALLEST_STEP, step)
        if symmetric:
            return step, torch.zeros_like(step)
        return step, (-torch.round(self._tensors["input_low"] / step)).clamp(lowest, highest)

    def _fake_quantized(self, weight: Tensor, rows: slice) -> Tensor:
        """What the fake quantizer makes of some rows of W, (rows, groups, group) float32."""
        layer = self.layer
        if layer.rank:
            weight = weight + self._product(rows)
        low, width = self._tensors["input_low"][rows], self._tensors["input_range"][rows]
        top = self._encoding.highest - self._encoding.lowest
        inverse = width.reciprocal() * top if self._encoding.bits == 4 else torch.full_like(width, top) / width
        position = weight.reshape(-1, layer.groups, layer.group_size).clamp(low, low + width).sub_(low)
        return position.mul_(inverse).sub_(torch.round(-low * inverse)).round_().div_(inverse)

    def _product(self, rows: slice) -> Tensor:
        """B·A as torch summed it, (rows, input) float32."""
        width, positions = self.layer.in_features, self._tensors["product_positions"]
        product = _exact_product(self.layer, self._tensors["lora_A"], self._tensors["lora_B"][rows])
        begin, end = torch.searchsorted(positions, torch.tensor((rows.start * width, rows.stop * width))).tolist()
        product.view(-1)[positions[begin:end] - rows.start * width] = self._tensors["product_values"][begin:end]
        return product


def _range_names(layer: LayerFormat) -> tuple[str, ...]:
    """The parameters of a layer's ranges, in a checkpoint."""
    return ("input_low", "input_range", "scale") if layer.require_encoding().symmetric else ("input_low", "input_range")


def tuned_adapter(layer: LayerFormat, lora_a: Tensor, lora_b: Tensor) -> dict[str, Tensor]:
    """What a checkpoint holds of an adapter; its product is summed by torch, here, as NNCF's export does it.

    Args:
        lora_a, lora_b: (rank, input) and (output, rank), of any float type; NNCF loads them as bfloat16.
    """
    lora_a, lora_b = lora_a.bfloat16(), lora_b.bfloat16()
    summed = (lora_b[:, : layer.used_rank] @ lora_a[: layer.used_rank]).float()
    differing = [
        torch.nonzero(summed[rows].reshape(-1) != _exact_product(layer, lora_a, lora_b[rows]).view(-1))[:, 0]
        + rows.start * layer.in_features
        for rows in _blocks(layer)
    ]
    positions = torch.cat(differing)
    return {
        "lora_A": lora_a.float(),
        "lora_B": lora_b.float(),
        "product_positions": positions,
        "product_values": summed.view(-1)[positions],
    }


def _exact_product(layer: LayerFormat, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """B·A of some rows of B, summed in float64 and rounded to bfloat16, (rows, input) float32."""
    rank = layer.used_rank
    return (lora_b[:, :rank].double() @ lora_a[:rank].double()).float().bfloat16().float()


def _blocks(layer: LayerFormat) -> Iterator[slice]:
    height = max(1, _BLOCK_ELEMENTS // layer.in_features)
    return (slice(begin, begin + height) for begin in range(0, layer.out_features, height))


def _rising(positions: Tensor, count: int) -> bool:
    """Whether they are whole numbers from 0 up, each larger than the one before and below the count."""
    return positions.dtype == torch.int64 and (
        not len(positions) or bool(positions[0] >= 0 and positions[-1] < count and (positions.diff() > 0).all())
    )
