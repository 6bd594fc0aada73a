"""The stage: rounding to nearest, then what the recipe asks for on top of it. Leaves the checkpoint that tuning begins
from, which is the plain twin's as well."""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.artifacts import Checkpoint, PreparedData
from ovexport.compress.starting_points.gptq import gptq
from ovexport.compress.starting_points.nncf import awq_and_scales
from ovexport.errors import UnsupportedModelError
from ovexport.models.architecture import matrix, weight_digest, weight_matrices
from ovexport.models.checkpoint import write_checkpoint
from ovexport.models.loading import load_model
from ovexport.recipe import CompressSpec, ModelSpec
from ovexport.weights.layer import LayerFormat
from ovexport.weights.policy import plan_layers
from ovexport.weights.quantizer import LARGEST_STEP, FakeQuantizer
from ovexport.weights.ranks import RankSpace

logger = logging.getLogger(__name__)


def compress(model: ModelSpec, spec: CompressSpec, data: PreparedData, seed: int, out: Path) -> Checkpoint:
    """Decide the fate of every layer and find its starting codes.

    Args:
        data: calibrates AWQ, Scale Estimation and GPTQ.
        seed: of the adapters' random side.

    Raises:
        RecipeError: a layer's in-features can't be grouped as asked.
        UnsupportedModelError: a layer can't be compressed, or holds weights that are not finite or too large for
            float16 scales.
    """
    network = load_model(model)
    layers = plan_layers(weight_matrices(network), spec)
    _tell(layers)
    packed = [layer for layer in layers if layer.encoding]
    generator = torch.Generator().manual_seed(seed)
    quantizers = {layer.name: FakeQuantizer(layer) for layer in packed}
    weights = {layer.name: matrix(network, layer.name, transposed=layer.transposed) for layer in layers}
    digests = {name: weight_digest(weight) for name, weight in weights.items()}
    for name, parameter in network.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UnsupportedModelError(f"{name}: holds weights that are not finite; give a sound checkpoint")
    for layer in packed:
        quantizers[layer.name].initialize(weights[layer.name], generator)
        if float(quantizers[layer.name].grid()[0].abs().max()) >= LARGEST_STEP:
            raise UnsupportedModelError(
                f"{layer.name}: holds weights up to {float(weights[layer.name].abs().max()):.3g}, which float16 scales "
                f"can't reach; give a sound checkpoint, or name the layer in compress.ignored"
            )
    changed: dict[str, Tensor] = {}
    if spec.awq or spec.scale_estimation or spec.gptq:
        calibration = _sample(data.tokens("train"), spec.calibration_sequences)
    if spec.awq or spec.scale_estimation:
        changed = awq_and_scales(network, layers, spec, calibration, quantizers, generator)
    if spec.gptq:
        changed |= _rounded_by_gptq(network, layers, quantizers, changed, calibration)
    space = RankSpace.of(layers, spec.rank_space or (), spec.rank_by).ranks
    return write_checkpoint(
        out, model, layers, digests, weights, quantizers, changed, rank_space=space, rank_by=spec.rank_by
    )


def _tell(layers: tuple[LayerFormat, ...]) -> None:
    """Say which layers are not as the recipe asked, a line per reason."""
    for note, count in Counter(layer.note for layer in layers if layer.note).items():
        first = next(layer.name for layer in layers if layer.note == note).removesuffix(".weight")
        logger.info("  %s: %s", first if count == 1 else f"{first} and {count - 1} more", note)


def _sample(tokens: NDArray[np.int32], count: int) -> Tensor:
    """So many of the sequences, evenly spread."""
    chosen = np.linspace(0, len(tokens) - 1, min(count, len(tokens))).round().astype(int)
    return torch.from_numpy(tokens[chosen]).long()


def _rounded_by_gptq(
    network: PreTrainedModel,
    layers: tuple[LayerFormat, ...],
    quantizers: dict[str, FakeQuantizer],
    changed: dict[str, Tensor],
    calibration: Tensor,
) -> dict[str, Tensor]:
    """GPTQ's weights of the 4-bit layers; the 8-bit ones count as they ship."""
    for layer in layers:
        parameter = network.get_parameter(layer.name)
        parameter.data = parameter.data.float().clone()  # the model's own weights are read again afterwards
        weight = matrix(network, layer.name, transposed=layer.transposed)
        if layer.name in changed:
            weight.copy_(changed[layer.name])
        if layer.encoding and layer.encoding.bits == 8:
            quantizers[layer.name].dequantize_into(weight.clone(), weight)
    tuned = [layer for layer in layers if layer.encoding and layer.encoding.bits == 4]
    return gptq(network.float(), tuned, quantizers, calibration)
