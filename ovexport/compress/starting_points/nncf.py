"""AWQ and Scale Estimation as starting points, by NNCF: the model is compressed by it in the FQ_LORA format, and the
weights and quantization ranges that it found are read out of its quantizers."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.errors import UnsupportedModelError
from ovexport.foreign import exhausted, said
from ovexport.models.architecture import parameter_of_hook
from ovexport.recipe import CompressSpec
from ovexport.weights.layer import LayerFormat
from ovexport.weights.quantizer import FakeQuantizer


def awq_and_scales(
    network: PreTrainedModel,
    layers: tuple[LayerFormat, ...],
    spec: CompressSpec,
    calibration: Tensor,
    quantizers: dict[str, FakeQuantizer],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Take over the ranges that NNCF finds; returns the weights that AWQ changed, (output, input) float32 by name."""
    check_layers(layers, spec)
    tuned = [layer for layer in layers if _as_asked(layer, spec)]
    found = _compressed_by_nncf(copy.deepcopy(network).float(), tuned, layers, spec, calibration)
    changed = {}
    for layer in layers:
        weight, ranges = found[layer.name]
        if not torch.equal(weight, network.get_parameter(layer.name).float()):
            changed[layer.name] = weight.contiguous()
        quantizer = quantizers.get(layer.name)
        if quantizer is None:
            continue
        if ranges is None:
            quantizer.initialize(weight, generator)
            continue
        shape = (layer.out_features, layer.groups, 1)
        with torch.no_grad():
            if quantizer.symmetric:
                quantizer.scale.copy_(ranges["scale"].reshape(shape))
            else:
                step = ranges["input_range"].reshape(shape) / quantizer.level_high
                quantizer.set_grid(step, ranges["input_low"].reshape(shape))
    return changed


def check_layers(layers: Iterable[LayerFormat], spec: CompressSpec) -> None:
    """Refuse layers that NNCF's methods can't do.

    Raises:
        UnsupportedModelError: one is a Conv1D.
    """
    transposed = [layer.name.removesuffix(".weight") for layer in layers if layer.transposed]
    if transposed and (spec.awq or spec.scale_estimation):
        raise UnsupportedModelError(
            f"{transposed[0]}: AWQ and Scale Estimation need Linear layers and this is a Conv1D; set compress.awq = "
            "false and compress.scale_estimation = false"
        )


def _as_asked(layer: LayerFormat, spec: CompressSpec) -> bool:
    """Whether NNCF, which knows one mode and one group size, can do a layer: it has the recipe's."""
    return layer.mode == spec.mode and layer.group_size == (
        layer.in_features if spec.group_size == -1 else spec.group_size
    )


def _compressed_by_nncf(
    network: PreTrainedModel,
    tuned: list[LayerFormat],
    layers: tuple[LayerFormat, ...],
    spec: CompressSpec,
    calibration: Tensor,
) -> dict[str, tuple[Tensor, dict[str, Tensor] | None]]:
    """By layer, the weight after NNCF and, where it quantized the layer to 4 bits, its quantizer's parameters."""
    import nncf
    from nncf.torch.function_hook.wrapper import get_hook_storage
    from nncf.torch.quantization.layers import AsymmetricLoraQuantizer, SymmetricLoraQuantizer

    names = {layer.name for layer in tuned}
    left_out = [layer for layer in layers if layer.kind == "linear" and layer.name not in names]
    scope = nncf.IgnoredScope(
        patterns=[f".*{layer.name.removesuffix('.weight').replace('.', '/')}/.*" for layer in left_out], validate=False
    )
    with _translated_nncf(network):
        compressed = nncf.compress_weights(
            network,
            mode=nncf.CompressWeightsMode(spec.mode),
            ratio=1.0,
            group_size=spec.group_size,
            ignored_scope=scope,
            all_layers=False,
            dataset=nncf.Dataset([{"input_ids": row.unsqueeze(0)} for row in calibration]),
            awq=spec.awq,
            scale_estimation=spec.scale_estimation,
            subset_size=len(calibration),
            compression_format=nncf.CompressionFormat.FQ_LORA,
            advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=1),
        )
    ranges: dict[str, dict[str, Tensor]] = {}
    for hook, module in get_hook_storage(compressed).named_hooks():
        parameter = parameter_of_hook(hook)
        if isinstance(module, AsymmetricLoraQuantizer | SymmetricLoraQuantizer):
            ranges[parameter] = {name: value.detach() for name, value in module.get_trainable_params().items()}
        elif type(module).__name__ == "SQMultiply":
            raise UnsupportedModelError(
                f"{network.config.model_type}: AWQ would add a multiplication to the graph at {hook}; "
                "set compress.awq = false"
            )
    missing = sorted(names - set(ranges))
    if missing:
        raise UnsupportedModelError(f"{missing[0]}: NNCF does not compress this layer; add it to compress.ignored")
    return {
        layer.name: (compressed.get_parameter(layer.name).detach(), ranges[layer.name] if layer.name in names else None)
        for layer in layers
    }


@contextmanager
def _translated_nncf(network: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # NNCF raises many kinds, not all of them its own
        raise exhausted(error, network.config.model_type) or UnsupportedModelError(
            f"{network.config.model_type}: NNCF can't compress it ({said(error)}); "
            "try compress.awq = false and compress.scale_estimation = false"
        ) from error
