"""Scales, zero points and the order of inputs of a layer that is packed already, checked, and the steps of unpacking
that several formats share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovexport.errors import ArtifactError, UnsupportedModelError
from ovexport.weights.encoding import Mode, encoding_of
from ovexport.weights.quantizer import TunableQuantizer

IN_ORDER = (0, 1, 2, 3, 4, 5, 6, 7)
"""Which of eight values each nibble of an int32 holds, from the lowest, where they are not interleaved."""
_MIDDLE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedGrid:
    """What the codes of a layer mean: entry = (code - zero point) · scale.

    Attributes:
        scale: (output, groups) float16, finite and not 0.
        zero_point: (output, groups) uint8, 0 to 15.
        order: the inputs group by group, (input,) int64; None where they lie so already.
        rounding: the largest change of a scale by rounding it to float16, in parts of it.
    """

    scale: NDArray[np.float16]
    zero_point: NDArray[np.uint8]
    order: NDArray[np.int64] | None = None
    rounding: float = 0.0

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle of the codes, so that they need none if they are signed."""
        return bool((self.zero_point == _MIDDLE).all())

    @property
    def mode(self) -> Mode:
        """The mode of the layer."""
        return encoding_of(bits=4, zero_points="none" if self.symmetric else "codes").mode

    def dequantized(self, codes: NDArray[np.uint8]) -> Tensor:
        """What the codes stand for, (output, input) float32, exact.

        Args:
            codes: (output, input), 0 to 15.
        """
        outputs, groups = self.scale.shape
        grouped = torch.from_numpy(codes).float().reshape(outputs, groups, -1)
        zero_point, scale = (torch.from_numpy(values).float()[..., None] for values in (self.zero_point, self.scale))
        return grouped.sub_(zero_point).mul_(scale).flatten(1)

    def set_on(self, quantizer: TunableQuantizer) -> None:
        """Give a quantizer of the layer's format this grid; one with zero points may have a symmetric one too, on which
        they are the middle of the codes.

        Raises:
            UnsupportedModelError: a scale is negative, and the format has zero points.
        """
        step, zero_point = (torch.from_numpy(values).float()[..., None] for values in (self.scale, self.zero_point))
        if quantizer.symmetric:
            quantizer.set_scale(step * _MIDDLE)
        elif (step < 0).any():
            raise UnsupportedModelError(
                f"{quantizer.layer.name}: has negative scales, which a format with zero points can't have; quantize it "
                "again"
            )
        else:
            quantizer.set_grid(step, -zero_point * step)


def make_grid(
    name: str, scale: NDArray[Any], zero_point: NDArray[np.uint8], order: NDArray[np.int64] | None
) -> PackedGrid:
    """A grid, its scales in float16.

    Args:
        name: of the layer, for messages.
        scale: (output, groups), of any float type.

    Raises:
        ArtifactError: a scale is 0 or not finite.
        UnsupportedModelError: float16 can't hold a scale, or one is negative beside zero points.
    """
    given = np.ascontiguousarray(scale).astype(np.float64)
    if not np.isfinite(given).all():
        raise ArtifactError(f"{name}: has a scale that is not finite; the checkpoint is damaged, make or copy it again")
    if not given.all():
        raise ArtifactError(f"{name}: has a scale of 0, with which no code means anything; quantize the model again")
    with np.errstate(over="ignore"):
        stored = given.astype(np.float16)
    if not stored.all() or not np.isfinite(stored).all():
        worst = given[(stored == 0) | ~np.isfinite(stored)][0]
        raise UnsupportedModelError(f"{name}: has a scale of {worst:.3g}, which float16 can't hold; quantize it again")
    rounding = float((np.abs(stored.astype(np.float64) - given) / np.abs(given)).max(initial=0.0))
    grid = PackedGrid(scale=stored, zero_point=np.ascontiguousarray(zero_point), order=order, rounding=rounding)
    if not grid.symmetric and (stored < 0).any():
        raise UnsupportedModelError(
            f"{name}: has negative scales beside zero points, which can't be tuned; quantize it symmetrically"
        )
    return grid


def unpacked_columns(packed: NDArray[np.int32], order: Sequence[int] = IN_ORDER) -> NDArray[np.uint8]:
    """The 4-bit values of a matrix that is packed along its rows, (rows, 8 · columns), 0 to 15.

    Args:
        packed: (rows, columns), eight values each.
        order: which of the eight each nibble holds, from the lowest.
    """
    words = np.ascontiguousarray(packed).view(np.uint32)
    values = np.empty((*words.shape, len(order)), np.uint8)
    for nibble, place in enumerate(order):
        values[..., place] = words >> np.uint32(4 * nibble) & np.uint32(0xF)
    return values.reshape(len(words), -1)


def order_of(name: str, groups_of_inputs: NDArray[Any], groups: int) -> NDArray[np.int64] | None:
    """The inputs group by group, each group's in their own order; None where they lie so already.

    Args:
        groups_of_inputs: the group of each input, (input,).

    Raises:
        ArtifactError: a group is out of range, or groups have different sizes.
    """
    if groups_of_inputs.min() < 0 or groups_of_inputs.max() >= groups:
        wrong = int(groups_of_inputs[(groups_of_inputs < 0) | (groups_of_inputs >= groups)][0])
        raise ArtifactError(
            f"{name}: its act-order (g_idx) names group {wrong} of {groups}; the checkpoint is damaged, copy it again"
        )
    sizes = np.bincount(groups_of_inputs, minlength=groups)
    if (sizes != sizes[0]).any():
        raise ArtifactError(
            f"{name}: its act-order (g_idx) gives groups of {sizes.min()} and of {sizes.max()} inputs; groups have to "
            "be of one size, quantize the model again"
        )
    order = np.argsort(groups_of_inputs, kind="stable").astype(np.int64)
    return None if (order == np.arange(len(order))).all() else order
