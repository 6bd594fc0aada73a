"""NNCF's fake quantizers, as its documentation tunes them (FQ_LORA, FQ_LORA_NLS): its own code, driven by our loop.

    forward, in the weight's type:   fake_quantize(W + bfloat16(B·A))          by nncf.torch
    what ships:                      the codes of `nncf_quantizer`, which `nncf.strip` packs

The two differ by rounding: scales ship in float16, and are trained in float32. What is validated, kept and recorded is
what ships. Adapters are kept in float32 and rounded to bfloat16 wherever they are used; NNCF's examples tune them in
bfloat16, in which small steps are lost.

Source: nncf 3.4, torch/quantization/quantize_functions.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ovexport.weights.layer import LayerFormat
from ovexport.weights.nncf_quantizer import NncfQuantizer, tuned_adapter
from ovexport.weights.quantizer import Codes, Rows, TunableQuantizer

_SMALLEST = 1e-16  # NNCF's, against a division by zero


class NncfFakeQuantizer(TunableQuantizer):
    """A quantizer of NNCF's; `input_low` and `input_range`, or `scale`, are (output, groups, 1) float32."""

    trains_what_ships = False

    def __init__(self, layer: LayerFormat) -> None:
        super().__init__(layer)
        self._loaded: dict[str, Tensor] = {}

    @property
    def range_names(self) -> tuple[str, ...]:
        """As TunableQuantizer."""
        return ("scale",) if self.symmetric else ("input_low", "input_range")

    @torch.no_grad()
    def take(self, values: Mapping[str, Tensor]) -> None:
        """Take over the parameters of a quantizer of NNCF's, in any shape."""
        self._loaded = {}
        for name, parameter in self.named_parameters():
            parameter.copy_(values[name].reshape(parameter.shape))

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """As TunableQuantizer; until a parameter changes, `stored` gives these very values."""
        self.take(values)
        self._loaded = dict(values)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """As NncfQuantizer."""
        names = [name for name, _ in self.named_parameters()]
        if self._loaded and all(torch.equal(self._loaded[name], getattr(self, name).cpu()) for name in names):
            return dict(self._loaded)
        values = {name: getattr(self, name).detach().cpu() for name in self.range_names}
        values = clipped_ranges(values, bits=self.encoding.bits, adapter=self.layer.rank > 0)
        return values | (tuned_adapter(self._used(), self.lora_A.cpu(), self.lora_B.cpu()) if self.layer.rank else {})

    @torch.no_grad()
    def train_into(self, weight: Rows, out: Tensor) -> None:
        """As TunableQuantizer: what NNCF's module gives; of a layer that is not tuned, what ships."""
        if self.layer.rank:
            out.copy_(self._fake_quantized(weight[:]))
        else:
            self.dequantize_into(weight, out)

    @torch.no_grad()
    def dequantize_into(self, weight: Rows, out: Tensor) -> None:
        """As TunableQuantizer."""
        codes = self.quantize(weight)
        values = codes.codes.float().reshape(-1, self.layer.groups, self.layer.group_size)
        if codes.zero_point is not None:
            values -= codes.zero_point.float()
        out.copy_((values * codes.scale.float()).flatten(1))

    @torch.no_grad()
    def quantize(self, weight: Rows) -> Codes:
        """As TunableQuantizer."""
        return NncfQuantizer(self._used(), self.stored()).quantize(_OnCpu(weight))

    def gradients(self, weight: Rows, gradient: Tensor) -> dict[str, Tensor]:
        """As TunableQuantizer, by NNCF's backward."""
        parameters = dict(self.named_parameters())
        with torch.enable_grad():
            values = self._fake_quantized(weight[:].detach())
            found = torch.autograd.grad(values, list(parameters.values()), gradient.to(values.dtype), allow_unused=True)
        return {
            name: torch.zeros_like(parameter) if each is None else each
            for (name, parameter), each in zip(parameters.items(), found, strict=True)
        }

    def _fake_quantized(self, weight: Tensor) -> Tensor:
        from nncf.torch.quantization.quantize_functions import asymmetric_quantize_lora, symmetric_quantize_lora

        layer, rank = self.layer, self.active_rank
        shape = (layer.out_features, layer.groups, layer.group_size)
        adapter = (self.lora_A[:rank].bfloat16(), self.lora_B[:, :rank].bfloat16())
        levels = (self.level_low, self.level_high, self.level_high - self.level_low + 1, _SMALLEST)
        with torch.compiler.set_stance("force_eager"):  # NNCF compiles parts of it, which takes a C++ compiler
            if self.symmetric:
                quantized: Tensor = symmetric_quantize_lora(weight, shape, *adapter, self.scale, *levels)
            else:
                quantized = asymmetric_quantize_lora(weight, shape, *adapter, self.input_low, self.input_range, *levels)
        return quantized

    def _used(self) -> LayerFormat:
        """The format with the ranks that are in use."""
        if self.active_rank == self.layer.used_rank:
            return self.layer
        return self.layer.with_values(active_rank=self.active_rank)


class _OnCpu:
    """Rows of a weight, read to the CPU's memory."""

    def __init__(self, weight: Rows) -> None:
        self._weight = weight

    def __getitem__(self, rows: slice, /) -> Tensor:
        return self._weight[rows].cpu()


def clipped_ranges(parameters: Mapping[str, Tensor], *, bits: int, adapter: bool) -> dict[str, Tensor]:
    """What a quantizer of NNCF's clips to, and the scale of a symmetric one, float32, in the parameters' shapes.

    Args:
        parameters: `scale`, or `input_low` and `input_range`.
        adapter: whether it has one; symmetric quantizers without read their scale in another way.
    """
    from nncf.torch.quantization.quantize_functions import TuneRange

    if "scale" not in parameters:
        low, width = parameters["input_low"].float(), parameters["input_range"].float().abs() + _SMALLEST
        low, width = TuneRange.apply(low, width, 2**bits)
        return {"input_low": low, "input_range": width}
    scale = parameters["scale"].float()
    if adapter:
        used = torch.where(scale.abs() < _SMALLEST, _SMALLEST, scale)
        low, width = torch.where(used > 0, -used, used / 8 * 7), (used * 1.875).abs()
    else:
        used = scale.abs() + _SMALLEST
        low = used * (-128 / 127)
        width = used - low
    return {"input_low": low, "input_range": width, "scale": scale}
