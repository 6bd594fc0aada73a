"""The fake quantizer that trains and the codes that ship: one arithmetic, in float32, whatever the model's dtype.

    W' = W + B·A                          (B·A summed in float64 and rounded once, so the order of the sum is no matter)
    step = float16(range / 15)            the scale that ships; symmetric: float16(scale / 8), and may be negative
    zero_point = clamp(round(zero point), 0, 15)
    code = clamp(round(W' / step) + zero_point, 0, 15)
    dequantized = (code - zero_point) · step

Rounding is half to even. A checkpoint holds NNCF's parameters (`input_low`, `input_range`; `scale` for symmetric). What
is tuned in place of `input_low` is the zero point: low / step is a whole number only as long as neither moves, and a
zero point that flips because the step was learned shifts its whole group. Gradients pass the rounding unchanged
(straight-through) and are those of Learned Step Size Quantization (arXiv:1902.08153) for the range and of LSQ+
(arXiv:2004.09576) for the zero point. NNCF itself learns `input_low`, adds B·A in the weight's dtype, and rounds the
scale to float16 only on export; that is where its codes differ between training and export. A checkpoint that
NNCF tuned keeps NNCF's arithmetic, which is in `nncf_quantizer`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ovexport.storage.digests import bytes_digest
from ovexport.weights.layer import CodeDigest, LayerFormat

SMALLEST_STEP = 2.0**-24
LARGEST_STEP = 65504.0
_BLOCK_ELEMENTS = 2**18


class Rows(Protocol):
    """A matrix that is read block by block: a tensor, or weights that lie in a file."""

    def __getitem__(self, rows: slice, /) -> Tensor:
        """Some rows, (rows, input)."""


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantized matrix.

    Attributes:
        codes: (output, input), uint8, or int8 where symmetric.
        scale: (output, groups, 1), float16.
        zero_point: (output, groups, 1), uint8 or float16, as the encoding has it; None where symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def digest(self) -> CodeDigest:
        """SHA-256 of each tensor's bytes."""
        zero_point = None if self.zero_point is None else bytes_digest(self.zero_point.cpu().contiguous().numpy())
        return CodeDigest(
            codes=bytes_digest(self.codes.cpu().contiguous().numpy()),
            scale=bytes_digest(self.scale.cpu().contiguous().numpy()),
            zero_point=zero_point,
        )


class Quantizer(Protocol):
    """What gives a layer its codes, and its parameters to a checkpoint."""

    def quantize(self, weight: Rows) -> Codes:
        """The codes of a weight, (output, input), with the adapter absorbed."""

    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, by name."""


class TunableQuantizer(nn.Module, ABC):
    """A layer's grid, its adapter, and the codes that they give: what every way of tuning a quantized layer shares.

    Parameters, all float32: `input_range` and `zero_point` (in steps), (output, groups, 1), or `scale` of that shape
    where symmetric; and `lora_A` and `lora_B` where the layer has an adapter. INT8 layers have none and are not tuned.

    Attributes:
        active_rank: how many rows of A and columns of B, from the first, are in use; they are sliced, not copied, and
            the others get no gradient.
        tunes_grid: whether scales and zero points are tuned together with the adapter.
        trains_what_ships: whether a training step sees the very matrix that ships.
    """

    tunes_grid: ClassVar[bool] = True
    trains_what_ships: ClassVar[bool] = True
    scale: nn.Parameter
    input_range: nn.Parameter
    zero_point: nn.Parameter
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, layer: LayerFormat) -> None:
        super().__init__()
        self.layer = layer
        self.active_rank = layer.used_rank
        self.encoding = layer.require_encoding()
        self.level_low, self.level_high = self.encoding.lowest, self.encoding.highest
        grid = (layer.out_features, layer.groups, 1)
        for name in self.range_names:
            setattr(self, name, nn.Parameter(torch.zeros(grid), requires_grad=layer.rank > 0 and self.tunes_grid))
        if layer.rank:
            self.lora_A = nn.Parameter(torch.zeros(layer.rank, self.adapter_inputs(layer)))
            self.lora_B = nn.Parameter(torch.zeros(layer.out_features, layer.rank))

    @staticmethod
    def adapter_inputs(layer: LayerFormat) -> int:
        """How many values of a token the layer's adapter sees."""
        return layer.in_features

    @abstractmethod
    def gradients(self, weight: Rows, gradient: Tensor) -> dict[str, Tensor]:
        """Gradients of the parameters that are tuned, by name.

        Args:
            weight: (output, input).
            gradient: of the matrix that `dequantize_into` gives.
        """

    def adapter_output(self, inputs: Tensor) -> Tensor:
        """What the adapter adds to the layer's output, (…, output), for inputs (…, input); differentiable.

        Raises:
            NotImplementedError: the adapter is no addend of the output, because it is rounded with the weight.
        """
        raise NotImplementedError(f"{self.layer.name}: its adapter is rounded with the weight")

    def forward(self, weight: Tensor) -> Tensor:
        """The matrix that the model computes with, (output, input) float32, differentiable in the parameters that are
        tuned (not in `weight`)."""
        result: Tensor = _Dequantized.apply(self, weight, *self.parameters())  # type: ignore[no-untyped-call]
        return result

    @property
    def symmetric(self) -> bool:
        """Whether there is no zero point."""
        return self.encoding.symmetric

    @property
    def range_names(self) -> tuple[str, ...]:
        """The parameters that set scale and zero point."""
        return ("scale",) if self.symmetric else ("input_range", "zero_point")

    @torch.no_grad()
    def initialize(self, weight: Tensor, generator: torch.Generator) -> None:
        """Round to nearest: the range of each group from its extremes and 0; B = 0, A random, so that W' = W.

        A zero point can't say where a range lies that does not hold 0: all values of such a group, which small groups
        may well be, would be clipped to one.

        Args:
            weight: (output, input).
            generator: draws A, uniform within 1 / sqrt(its inputs), as PEFT's LoRA does.
        """
        self.fit_grid(weight)
        if self.layer.rank:
            bound = self.adapter_inputs(self.layer) ** -0.5
            self.lora_A.uniform_(-bound, bound, generator=generator)

    @torch.no_grad()
    def fit_grid(self, weight: Tensor) -> None:
        """Set the smallest grid that holds each group of a weight, (output, input), and 0."""
        grouped = weight.float().reshape(self.layer.out_features, self.layer.groups, self.layer.group_size)
        low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
        if self.symmetric:
            self.set_scale(torch.where(-low >= high, -low, -high))
        else:
            self.set_grid((high - low) / self.level_high, low)

    @torch.no_grad()
    def set_grid(self, step: Tensor, low: Tensor) -> None:
        """Set an asymmetric range from a step and a lower end, both (output, groups, 1); low falls on the grid."""
        step = _on_float16_grid(step)
        self.input_range.copy_(step * self.level_high)
        self.zero_point.copy_(torch.round(-low / step).clamp(0, self.level_high))

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Set a symmetric range: the step times 8, or 128 for 8 bits, (output, groups, 1); negative swaps its ends."""
        self.scale.copy_(scale)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it: NNCF's parameters, float32."""
        values = {name: value.detach() for name, value in self.named_parameters()}
        if not self.symmetric:
            step, zero_point = self.grid()
            del values["zero_point"]
            values["input_low"] = -zero_point * step
        return values

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over what `stored` gives, or NNCF's parameters in our shapes."""
        for name, parameter in self.named_parameters():
            if name != "zero_point":
                parameter.copy_(values[name])
        if not self.symmetric:
            low = values["input_low"].to(self.input_range.device)
            self.zero_point.copy_(torch.round(-low / self.grid()[0]).clamp(0, self.level_high))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Step and zero point, (output, groups, 1) float32; the step holds float16 values, the zero point integers."""
        if self.symmetric:
            step = _on_float16_grid(self.scale.detach() / -self.level_low)
            return step, torch.zeros_like(step)
        step = _on_float16_grid(self.input_range.detach().abs() / self.level_high)
        return step, torch.round(self.zero_point.detach()).clamp(0, self.level_high)

    def shipped_zero_point(self) -> Tensor:
        """The zero point that the codes are de-quantized with, (output, groups, 1) float32: the grid's, unless the
        adapter is added to it."""
        return self.grid()[1]

    @torch.no_grad()
    def dequantize_into(self, weight: Rows, out: Tensor) -> None:
        """Write the matrix that the model computes with, (output, input), to `out`, of any float type, a block of rows
        at a time."""
        zero_point, (step, _) = self.shipped_zero_point(), self.grid()
        for rows, codes in self._codes(weight):
            out[rows] = codes.sub_(zero_point[rows]).mul_(step[rows]).flatten(1)

    def train_into(self, weight: Rows, out: Tensor) -> None:
        """Write the matrix that a training step computes with to `out`: what ships, unless the class says otherwise."""
        self.dequantize_into(weight, out)

    @torch.no_grad()
    def quantize(self, weight: Rows) -> Codes:
        """The codes as they ship; of `weight`, (output, input), a block of rows is read at a time."""
        step, _ = self.grid()
        integer = getattr(torch, self.encoding.code_dtype)
        codes = torch.empty(self.layer.out_features, self.layer.in_features, dtype=integer, device=step.device)
        for rows, block in self._codes(weight):
            codes[rows] = block.flatten(1).to(integer)
        zero_point = None
        if not self.symmetric:
            zero_point = self.shipped_zero_point().to(
                torch.float16 if self.encoding.zero_points == "float16" else integer
            )
        return Codes(codes=codes, scale=step.half(), zero_point=zero_point)

    def _codes(self, weight: Rows) -> Iterator[tuple[slice, Tensor]]:
        """Codes by blocks of rows, each (rows, groups, group) float32."""
        step, zero_point = self.grid()
        for rows, values in self._rounded_values(weight, torch.float64):
            codes = (torch.round(values / step[rows]) + zero_point[rows]).clamp(self.level_low, self.level_high)
            yield rows, codes

    def _rounded_values(self, weight: Rows, _dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """What is rounded to codes, by blocks of rows, each (rows, groups, group) float32: the weight, and an adapter
        that is absorbed in the codes, whose product is summed in `dtype`."""
        for rows in self._blocks():
            yield rows, weight[rows].float().reshape(-1, self.layer.groups, self.layer.group_size)

    def _blocks(self) -> Iterator[slice]:
        height = max(1, _BLOCK_ELEMENTS // self.layer.in_features)
        return (slice(begin, begin + height) for begin in range(0, self.layer.out_features, height))


class FakeQuantizer(TunableQuantizer):
    """dequantize(quantize(W + B·A)) of one matrix, with gradients for A, B and the quantization range.

    `lora_A` is (rank, input), `lora_B` (output, rank).
    """

    @torch.no_grad()
    def gradients(self, weight: Rows, gradient: Tensor) -> dict[str, Tensor]:
        """Gradients of the parameters from that of the de-quantized matrix, a block of rows at a time.

        Args:
            weight: (output, input).
            gradient: of that shape; float64 is worked on in float64, every other type in float32.
        """
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        step, zero_point = (value.to(dtype) for value in self.grid())
        lowest, highest = self.level_low - zero_point, self.level_high - zero_point
        result = {name: torch.zeros_like(value, dtype=dtype) for name, value in self.named_parameters()}
        rank = self.active_rank
        for rows, adapted in self._rounded_values(weight, dtype):
            incoming = gradient[rows].to(dtype).reshape(adapted.shape)
            position = adapted.to(dtype).div_(step[rows])
            clamped = torch.minimum(torch.maximum(position, lowest[rows]), highest[rows])
            inside = clamped == position
            passed = incoming * inside
            slope = torch.where(inside, clamped.round().sub_(position), clamped)
            spanned = slope.mul_(incoming).sum(-1, keepdim=True)
            if self.symmetric:
                result["scale"][rows] = spanned / -self.level_low
            else:
                result["input_range"][rows] = spanned / self.level_high
                result["zero_point"][rows] = (passed.sum(-1, keepdim=True) - incoming.sum(-1, keepdim=True)) * step[
                    rows
                ]
            if rank:
                flat = passed.flatten(1)
                result["lora_B"][rows, :rank] = flat @ self.lora_A[:rank].to(dtype).T
                result["lora_A"][:rank].addmm_(self.lora_B[rows, :rank].to(dtype).T, flat)
        if not self.symmetric:
            result["input_range"].mul_(self.input_range.detach().sign())
        return result

    def _rounded_values(self, weight: Rows, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """W + B·A, as TunableQuantizer."""
        rank = self.active_rank
        lora_a = self.lora_A[:rank].to(dtype) if rank else None
        for rows in self._blocks():
            block = weight[rows].float()
            if lora_a is not None:
                block = block + (self.lora_B[rows, :rank].to(dtype) @ lora_a).float()
            yield rows, block.reshape(-1, self.layer.groups, self.layer.group_size)


class _Dequantized(torch.autograd.Function):
    """A quantizer as an operation of autograd."""

    @staticmethod
    def forward(ctx: Any, quantizer: TunableQuantizer, weight: Tensor, *parameters: Tensor) -> Tensor:
        ctx.quantizer, ctx.weight = quantizer, weight
        result = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        quantizer.dequantize_into(weight, result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        result = ctx.quantizer.gradients(ctx.weight, gradients[0])
        return None, None, *(result.get(name) for name, _ in ctx.quantizer.named_parameters())


def _on_float16_grid(step: Tensor) -> Tensor:
    """The nearest float16 values, in float32; magnitudes from its smallest number up, signs kept."""
    magnitude = step.abs().clamp(SMALLEST_STEP, LARGEST_STEP)
    return torch.where(step < 0, -magnitude, magnitude).half().float()
