"""AWQ and Scale Estimation as starting points, by NNCF: the model is compressed by it in the FQ_LORA format, and the
weights and quantization ranges that it found are read out of its quantizers."""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ovexport.compress.starting_points.starting_point import Start, StartingPoint, starting_points
from ovexport.errors import UnsupportedModelError
from ovexport.foreign import exhausted, said
from ovexport.models.architecture import parameter_of_hook
from ovexport.recipe import CompressSpec
from ovexport.weights.layer import LayerFormat
from ovexport.weights.quantizer import TunableQuantizer

logger = logging.getLogger(__name__)


class _Nncf(StartingPoint):
    """A compression by NNCF with some of its methods."""

    needs_text = True
    estimates_scales = False

    @property
    def _keys(self) -> tuple[str, ...]:
        keys = {"awq": self.replaces_weights, "scale_estimation": self.estimates_scales}
        return tuple(f"compress.{key} = false" for key, used in keys.items() if used)

    def check(self, layers: Sequence[LayerFormat], spec: CompressSpec) -> None:
        """Refuse layers that NNCF's methods can't do.

        Raises:
            UnsupportedModelError: one is a Conv1D.
        """
        transposed = [layer.name.removesuffix(".weight") for layer in layers if layer.transposed]
        if transposed:
            raise UnsupportedModelError(
                f"{transposed[0]}: AWQ and Scale Estimation need Linear layers and this is a Conv1D; "
                f"set {' and '.join(self._keys)}"
            )

    @torch.no_grad()
    def apply(self, start: Start) -> None:
        """Take over the weights and ranges that NNCF finds; layers that it does not do are rounded to nearest.

        Raises:
            UnsupportedModelError: NNCF can't do the model, or a layer of it.
        """
        self.check(start.layers, start.spec)
        tuned = [layer for layer in start.layers if layer.encoding and _as_asked(layer, start.spec)]
        others = sum(1 for layer in start.layers if layer.rank and layer not in tuned)
        if others:
            logger.info("  NNCF takes one mode and group size; layers with others are rounded to nearest: %d", others)
        compressed = self._compress(start, tuned)
        ranges = _ranges(compressed, start.network.config.model_type)
        missing = sorted({layer.name for layer in tuned} - set(ranges))
        if missing:
            raise UnsupportedModelError(f"{missing[0]}: NNCF does not compress this layer; add it to compress.ignored")
        for layer in start.layers:
            weight = compressed.get_parameter(layer.name).detach()
            if not torch.equal(weight, start.weight(layer.name).float()):
                start.replaced_weights[layer.name] = weight.contiguous()
            quantizer = start.quantizers.get(layer.name)
            if quantizer is not None and layer in tuned:
                _set_ranges(quantizer, ranges[layer.name])
            elif quantizer is not None:
                quantizer.initialize(weight, start.generator)

    def _compress(self, start: Start, tuned: Sequence[LayerFormat]) -> nn.Module:
        """A copy of the model, compressed by NNCF in the FQ_LORA format."""
        import nncf

        spec, network = start.spec, copy.deepcopy(start.network).float()
        left_out = [layer for layer in start.layers if layer.kind == "linear" and layer not in tuned]
        names = [layer.name.removesuffix(".weight").replace(".", "/") for layer in left_out]
        with self._translated_errors(network):
            compressed: nn.Module = nncf.compress_weights(
                network,
                mode=nncf.CompressWeightsMode(spec.mode),
                ratio=1.0,
                group_size=spec.group_size,
                ignored_scope=nncf.IgnoredScope(patterns=[f".*{name}/.*" for name in names], validate=False),
                all_layers=False,
                dataset=nncf.Dataset([{"input_ids": row.unsqueeze(0)} for row in start.calibration]),
                awq=self.replaces_weights,
                scale_estimation=self.estimates_scales,
                subset_size=len(start.calibration),
                compression_format=nncf.CompressionFormat.FQ_LORA,
                advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=1),
            )
        return compressed

    @contextmanager
    def _translated_errors(self, network: PreTrainedModel) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # NNCF raises many kinds, not all of them its own
            raise exhausted(error, network.config.model_type) or UnsupportedModelError(
                f"{network.config.model_type}: NNCF can't compress it ({said(error)}); try {' and '.join(self._keys)}"
            ) from error


@starting_points.register("awq")
class Awq(_Nncf):
    """Weights that AWQ scaled, on ranges of its own."""

    replaces_weights = True


@starting_points.register("scale_estimation")
class ScaleEstimation(_Nncf):
    """The model's weights, on ranges that Scale Estimation found."""

    estimates_scales = True


@starting_points.register("awq_scale_estimation")
class AwqScaleEstimation(_Nncf):
    """Weights that AWQ scaled, on ranges that Scale Estimation found."""

    replaces_weights = True
    estimates_scales = True


def _as_asked(layer: LayerFormat, spec: CompressSpec) -> bool:
    """Whether NNCF, which knows one mode and one group size, can do a layer: it has the recipe's."""
    group_size = layer.in_features if spec.group_size == -1 else spec.group_size
    return layer.mode == spec.mode and layer.group_size == group_size


def _ranges(compressed: nn.Module, model_type: str) -> dict[str, dict[str, Tensor]]:
    """By layer, the parameters of the quantizers with 4 bits."""
    from nncf.torch.function_hook.wrapper import get_hook_storage
    from nncf.torch.quantization.layers import AsymmetricLoraQuantizer, SymmetricLoraQuantizer

    ranges: dict[str, dict[str, Tensor]] = {}
    for hook, module in get_hook_storage(compressed).named_hooks():
        if isinstance(module, AsymmetricLoraQuantizer | SymmetricLoraQuantizer):
            parameters = module.get_trainable_params().items()
            ranges[parameter_of_hook(hook)] = {name: value.detach() for name, value in parameters}
        elif type(module).__name__ == "SQMultiply":
            raise UnsupportedModelError(
                f"{model_type}: AWQ would add a multiplication to the graph at {hook}; set compress.awq = false"
            )
    return ranges


def _set_ranges(quantizer: TunableQuantizer, ranges: dict[str, Tensor]) -> None:
    """Give a quantizer the ranges of NNCF's."""
    layer = quantizer.layer
    shape = (layer.out_features, layer.groups, 1)
    if quantizer.symmetric:
        quantizer.set_scale(ranges["scale"].reshape(shape))
    else:
        step = ranges["input_range"].reshape(shape) / quantizer.level_high
        quantizer.set_grid(step, ranges["input_low"].reshape(shape))
