"""Ways of tuning a quantized layer: what its adapter is added to, a module each."""

import numpy as np
import torch

from ovexport.errors import ArtifactError
from ovexport.storage.tensorfile import TensorFile
from ovexport.weights.adapters.beside import BesideQuantizer
from ovexport.weights.adapters.nncf import NncfFakeQuantizer, clipped_ranges
from ovexport.weights.adapters.qalora import QaLoraQuantizer
from ovexport.weights.layer import LayerFormat
from ovexport.weights.nncf_quantizer import NncfQuantizer
from ovexport.weights.quantizer import FakeQuantizer, Quantizer, TunableQuantizer

__all__ = [
    "BesideQuantizer",
    "NncfFakeQuantizer",
    "QaLoraQuantizer",
    "clipped_ranges",
    "load_any_quantizer",
    "load_quantizer",
    "make_quantizer",
]

_QUANTIZERS: dict[str, type[TunableQuantizer]] = {
    "lora": FakeQuantizer,
    "qalora": QaLoraQuantizer,
    "beside": BesideQuantizer,
}
"""By `LayerFormat.adapter`."""


def make_quantizer(layer: LayerFormat) -> TunableQuantizer:
    """A quantizer for a layer's format, with parameters that are all zero."""
    return NncfFakeQuantizer(layer) if layer.arithmetic == "nncf" else _QUANTIZERS[layer.adapter](layer)


def load_any_quantizer(layer: LayerFormat, adapters: TensorFile) -> Quantizer:
    """What gives the layer its codes, in whosever arithmetic it was tuned.

    Raises:
        ArtifactError: as load_quantizer.
    """
    return NncfQuantizer.load(layer, adapters) if layer.arithmetic == "nncf" else load_quantizer(layer, adapters)


def load_quantizer(layer: LayerFormat, adapters: TensorFile) -> TunableQuantizer:
    """The layer's quantizer with a checkpoint's parameters.

    Raises:
        ArtifactError: a parameter is missing, of another shape or not finite.
    """
    quantizer = make_quantizer(layer)
    if isinstance(quantizer, NncfFakeQuantizer):
        quantizer.load(NncfQuantizer.load(layer, adapters).stored())
        return quantizer
    values = {}
    for name, expected in quantizer.stored().items():
        value = values[name] = torch.from_numpy(np.array(adapters.require(f"{layer.name}.{name}")))
        if value.shape != expected.shape:
            raise ArtifactError(
                f"{layer.name}.{name}: shape {tuple(value.shape)} in the checkpoint, {tuple(expected.shape)} by "
                "its manifest; the checkpoint is corrupt, tune again"
            )
        if not torch.isfinite(value).all():
            raise ArtifactError(
                f"{layer.name}.{name}: holds values that are not finite; the checkpoint is corrupt, tune again"
            )
    quantizer.load(values)
    return quantizer
