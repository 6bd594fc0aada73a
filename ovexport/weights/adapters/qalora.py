"""QA-LoRA: an adapter of the means of each group of inputs, which is absorbed into zero points and leaves codes alone.

    y = Ŵ·x + (alpha / rank) · groups · B·A·mean(x)       mean(x): of each group, (groups); A (rank, groups)

What the adapter adds to a weight is the same for all inputs of a group, D = factor · B·A with factor = alpha / rank ·
groups / group size, so it shifts that group's zero point and nothing else:

    zero_point' = zero_point - D / step                    rounded to float16, or to a code of 0 to 15
    dequantized = (code - zero_point') · step              codes and steps are the quantized base's

D is summed in float64. The rounding is part of every training step, with a straight-through gradient: what is tuned is
what ships.

Source: Xu et al., arXiv:2309.14717 (section 3.3; its beta shift); the factor is that of PEFT's implementation.
"""

import torch
from torch import Tensor

from ovexport.weights.layer import LayerFormat
from ovexport.weights.quantizer import LARGEST_STEP, Rows, TunableQuantizer


class QaLoraQuantizer(TunableQuantizer):
    """The quantized base with an adapter in its zero points; base codes, scales and zero points are frozen.

    `lora_A` is (rank, groups), `lora_B` (output, rank).
    """

    tunes_grid = False

    @staticmethod
    def adapter_inputs(layer: LayerFormat) -> int:
        """As TunableQuantizer: the mean of each group."""
        return layer.groups

    @torch.no_grad()
    def shipped_zero_point(self) -> Tensor:
        """As TunableQuantizer."""
        exact = self._exact_zero_point()
        if self.encoding.zero_points == "float16":
            return exact.float().clamp(-LARGEST_STEP, LARGEST_STEP).half().float()
        return exact.float().round().clamp(self.level_low, self.level_high)

    @torch.no_grad()
    def gradients(self, weight: Rows, gradient: Tensor) -> dict[str, Tensor]:
        """As TunableQuantizer: those of A and B."""
        if not self.layer.rank:
            return {}
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        shifted = gradient.to(dtype).reshape(-1, self.layer.groups, self.layer.group_size).sum(-1)
        shifted *= self.layer.adapter_factor
        if self.encoding.zero_points == "codes":
            exact = self._exact_zero_point()[..., 0]
            shifted *= (exact >= self.level_low) & (exact <= self.level_high)
        return {"lora_A": self.lora_B.to(dtype).T @ shifted, "lora_B": shifted @ self.lora_A.to(dtype).T}

    def adapter_output(self, inputs: Tensor) -> Tensor:
        """As TunableQuantizer, without the rounding of the zero points."""
        groups = inputs.reshape(*inputs.shape[:-1], self.layer.groups, self.layer.group_size).sum(-1)
        added: Tensor = groups @ self.lora_A.T @ self.lora_B.T * self.layer.adapter_factor
        return added

    @torch.no_grad()
    def rounded_share(self) -> float:
        """The error of rounding the zero points over what the adapter adds to them, both as root mean squares."""
        exact = self._exact_zero_point()
        error = (self.shipped_zero_point().double() - exact).square().mean().sqrt()
        added = (exact - self.grid()[1].double()).square().mean().sqrt()
        return float(error / added) if added else 0.0

    def _exact_zero_point(self) -> Tensor:
        """The zero point before it is rounded, (output, groups, 1) float64."""
        step, zero_point = (value.double() for value in self.grid())
        if not self.layer.rank:
            return zero_point
        shift = self.lora_B.detach().double() @ self.lora_A.detach().double() * self.layer.adapter_factor
        return zero_point - shift[..., None] / step
