"""LoRA beside a quantized layer: codes and grid are frozen, and the adapter is an addend of its own.

    y = Ŵ·x + factor · B·A·x        factor = alpha / rank

What ships are the codes of Ŵ and, beside the IR, A and B as a LoRA adapter that openvino-genai adds while the model
runs. Nothing is rounded after tuning, and every token costs two small matrix products more.

Source: LoftQ, Li et al., arXiv:2310.08659, and QLoRA, Dettmers et al., arXiv:2305.14314.
"""

import torch
from torch import Tensor

from ovexport.weights.quantizer import Rows, TunableQuantizer


class BesideQuantizer(TunableQuantizer):
    """The quantized base with an adapter that is not rounded; base codes, scales and zero points are frozen.

    `lora_A` is (rank, input), `lora_B` (output, rank).
    """

    tunes_grid = False

    @torch.no_grad()
    def base(self, weight: Rows) -> Tensor:
        """What the codes of a weight, (output, input), stand for: a float32 matrix of that shape, without the
        adapter."""
        shape = (self.layer.out_features, self.layer.in_features)
        result = torch.empty(shape, dtype=torch.float32, device=self.grid()[0].device)
        super().dequantize_into(weight, result)
        return result

    @torch.no_grad()
    def product(self) -> Tensor:
        """factor · B·A, (output, input) float32."""
        return (self.lora_B.detach() @ self.lora_A.detach()).mul_(self.layer.adapter_factor)

    @torch.no_grad()
    def dequantize_into(self, weight: Rows, out: Tensor) -> None:
        """As TunableQuantizer: the sum of both."""
        out.copy_(self.base(weight).add_(self.product()) if self.layer.rank else self.base(weight))

    @torch.no_grad()
    def gradients(self, weight: Rows, gradient: Tensor) -> dict[str, Tensor]:
        """As TunableQuantizer: those of A and B."""
        if not self.layer.rank:
            return {}
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        scaled = gradient.to(dtype) * self.layer.adapter_factor
        return {"lora_A": self.lora_B.to(dtype).T @ scaled, "lora_B": scaled @ self.lora_A.to(dtype).T}

    def adapter_output(self, inputs: Tensor) -> Tensor:
        """As TunableQuantizer."""
        added: Tensor = inputs @ self.lora_A.T @ self.lora_B.T * self.layer.adapter_factor
        return added
