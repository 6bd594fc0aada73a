"""compress.engine = "nncf": the model is compressed by `nncf.compress_weights` as NNCF's documentation does it, and its
quantizers' parameters are taken over as they are."""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ovexport.compress.starting_points.starting_point import Start, StartingPoint
from ovexport.errors import RecipeError, UnsupportedModelError
from ovexport.foreign import exhausted, said
from ovexport.models.architecture import parameter_of_hook
from ovexport.recipe import CompressSpec
from ovexport.weights.adapters import NncfFakeQuantizer
from ovexport.weights.layer import LayerFormat

logger = logging.getLogger(__name__)


class NncfEngine(StartingPoint):
    """Weights, ranges and adapters as `nncf.compress_weights` leaves them, in the format FQ_LORA or FQ_LORA_NLS."""

    needs_text = True
    replaces_weights = True

    def check(self, layers: Sequence[LayerFormat], spec: CompressSpec) -> None:
        """Refuse layers that NNCF can't do as the recipe asks.

        Raises:
            RecipeError: a layer is smaller than the rank, which NNCF has one of for all.
            UnsupportedModelError: one is a Conv1D.
        """
        smallest = min((layer for layer in layers if layer.rank), key=lambda layer: layer.rank, default=None)
        if smallest is not None and smallest.rank < _rank(spec):
            raise RecipeError(
                f"compress.rank={_rank(spec)}: NNCF has one rank for all layers, and {smallest.rank} is the smaller "
                f"side of {smallest.name.removesuffix('.weight')}; use at most {smallest.rank}, or set "
                'compress.engine = "ovexport"'
            )
        for layer in layers:
            name = layer.name.removesuffix(".weight")
            if layer.transposed and layer.encoding:
                raise UnsupportedModelError(
                    f'{name}: a Conv1D, whose quantizer can\'t be taken over; set compress.engine = "ovexport"'
                )

    @torch.no_grad()
    def apply(self, start: Start) -> None:
        """As StartingPoint.

        Raises:
            UnsupportedModelError: NNCF can't do the model, or does a layer in another way than the recipe asks.
        """
        from nncf.torch.function_hook.wrapper import get_hook_storage

        compressed = self.compressed(start)
        modules = {parameter_of_hook(hook): module for hook, module in get_hook_storage(compressed).named_hooks()}
        for layer in start.layers:
            weight = compressed.get_parameter(layer.name).detach()
            if not torch.equal(weight.float(), start.weight(layer.name).float()):
                start.replaced_weights[layer.name] = weight.float().contiguous()
            quantizer, module = start.quantizers.get(layer.name), modules.pop(layer.name, None)
            if (module is None) != (quantizer is None):
                raise UnsupportedModelError(
                    f"{layer.name}: NNCF {'leaves it in floating point' if module is None else 'quantizes it'}, and "
                    'the recipe does not; set compress.engine = "ovexport"'
                )
            if isinstance(quantizer, NncfFakeQuantizer):
                _take(quantizer, module)
        if modules:
            raise UnsupportedModelError(
                f"{start.network.config.model_type}: NNCF adds a {type(next(iter(modules.values()))).__name__} to the "
                "graph; set compress.awq = false"
            )

    def compressed(self, start: Start) -> nn.Module:
        """A copy of the model as `nncf.compress_weights` returns it."""
        import nncf

        spec, network = start.spec, copy.deepcopy(start.network)
        names = [layer.name.removesuffix(".weight").replace(".", "/") for layer in start.layers if not layer.encoding]
        options = nncf.AdvancedCompressionParameters(lora_adapter_rank=_rank(spec))
        try:
            with torch.random.fork_rng():  # NNCF draws the adapters from torch's own generator
                torch.manual_seed(start.generator.initial_seed())
                compressed: nn.Module = nncf.compress_weights(
                    network,
                    mode=nncf.CompressWeightsMode(spec.mode),
                    ratio=1.0,
                    group_size=spec.group_size,
                    ignored_scope=nncf.IgnoredScope(patterns=[f".*{name}/.*" for name in names], validate=False),
                    dataset=nncf.Dataset([{"input_ids": row.unsqueeze(0)} for row in start.calibration]),
                    awq=spec.awq,
                    scale_estimation=spec.scale_estimation,
                    subset_size=len(start.calibration),
                    compression_format=nncf.CompressionFormat[spec.format.upper()],
                    advanced_parameters=options,
                )
        except Exception as error:  # NNCF raises many kinds, not all of them its own
            raise exhausted(error, network.config.model_type) or UnsupportedModelError(
                f"{network.config.model_type}: NNCF can't compress it ({said(error)}); set compress.engine = "
                '"ovexport"'
            ) from error
        return compressed


def _take(quantizer: NncfFakeQuantizer, module: Any) -> None:
    """Give a quantizer the parameters of NNCF's.

    Raises:
        UnsupportedModelError: it is of another kind.
    """
    parameters = module.get_trainable_params()
    names = {name for name, _ in quantizer.named_parameters()}
    layer, shapes = quantizer.layer, {name: value.numel() for name, value in quantizer.named_parameters()}
    bits, found = int(module.num_bits), {name: value.numel() for name, value in parameters.items() if name in names}
    if bits != layer.require_encoding().bits or found != shapes:
        raise UnsupportedModelError(
            f"{layer.name}: NNCF quantizes it to {bits} bits in groups of another size or mode than the recipe's; set "
            'compress.engine = "ovexport"'
        )
    quantizer.take({name: parameters[name].detach().float() for name in names})


def _rank(spec: CompressSpec) -> int:
    return max(spec.rank_space) if spec.rank_space else spec.rank
