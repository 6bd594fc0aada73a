"""The stage: the format of every layer, then the starting points, one after the other. It leaves the checkpoint that
tuning begins from, which is the plain twin's as well."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.artifacts import Checkpoint, PreparedData
from ovexport.compress.starting_points import Start, StartingPoint, chosen
from ovexport.errors import UnsupportedModelError
from ovexport.models.architecture import Architecture
from ovexport.models.checkpoint import write_checkpoint
from ovexport.models.loading import load_model, open_packed
from ovexport.models.matrix_view import weight_digest
from ovexport.recipe import CompressSpec, ModelSpec
from ovexport.registry import Registered
from ovexport.weights.adapters import make_quantizer
from ovexport.weights.layer import LayerFormat
from ovexport.weights.plan import plan_layers
from ovexport.weights.ranks import RankSpace

logger = logging.getLogger(__name__)


def compress(model: ModelSpec, spec: CompressSpec, data: PreparedData, seed: int, out: Path) -> Checkpoint:
    """Decide the format of every layer and find its starting codes.

    Args:
        data: calibrates starting points that need text.
        seed: of the adapters' random side.

    Raises:
        RecipeError: a layer's in-features can't be grouped as asked.
        PlugInError: a plug-in fails, or leaves what is no starting point.
        UnsupportedModelError: a layer can't be compressed, or holds weights that are not finite or too large for
            float16 scales.
    """
    network = load_model(model)
    architecture = Architecture(network)
    packed = open_packed(model)
    matrices = architecture.matrices()
    layers = plan_layers(packed.marked(matrices) if packed else matrices, spec)
    _tell(layers)
    _require_finite(network)
    points = chosen(spec)
    start = Start(
        network=network,
        spec=spec,
        layers=layers,
        weights={layer.name: architecture.matrix(layer.name).read() for layer in layers},
        quantizers={layer.name: make_quantizer(layer) for layer in layers if layer.encoding},
        generator=torch.Generator().manual_seed(seed),
        calibration=_calibration(points, data, spec),
        own_grids={name: packed.grid(name) for name in packed.layers} if packed else {},
    )
    digests = {name: weight_digest(weight) for name, weight in start.weights.items()}
    for registered in points:
        _apply(registered, start, digests)
    ranks = RankSpace.of(layers, spec.rank_space or (), spec.rank_by).ranks
    made = (digests, start.weights, start.quantizers, start.replaced_weights)
    checkpoint = write_checkpoint(out, model, layers, *made, rank_space=ranks, rank_by=spec.rank_by)
    if packed:
        packed.require_codes(checkpoint.manifest.layers, checkpoint.manifest.digests)
    return checkpoint


def _tell(layers: tuple[LayerFormat, ...]) -> None:
    """Say which layers are not as the recipe asked, a line per reason."""
    for note, count in Counter(layer.note for layer in layers if layer.note).items():
        first = next(layer.name for layer in layers if layer.note == note).removesuffix(".weight")
        logger.info("  %s: %s", first if count == 1 else f"{first} and {count - 1} more", note)


def _require_finite(network: PreTrainedModel) -> None:
    for name, parameter in network.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UnsupportedModelError(f"{name}: holds weights that are not finite; give a sound checkpoint")


def _calibration(points: Sequence[Registered[type[StartingPoint]]], data: PreparedData, spec: CompressSpec) -> Tensor:
    """Sequences of the training text, evenly spread, (sequences, length) int64; none where no starting point needs
    text."""
    if not any(registered.thing.needs_text for registered in points):
        return torch.empty(0, 0, dtype=torch.int64)
    tokens: NDArray[np.int32] = data.tokens("train")
    count = min(spec.calibration_sequences, len(tokens))
    rows = np.linspace(0, len(tokens) - 1, count).round().astype(int)
    return torch.from_numpy(tokens[rows]).long()


def _apply(registered: Registered[type[StartingPoint]], start: Start, digests: Mapping[str, str]) -> None:
    """Apply a starting point; what a plug-in leaves is looked at.

    Raises:
        PlugInError: it raises an error, or leaves weights or grids that can't be stored.
    """
    with registered.guarded():
        registered.thing().apply(start)
    if registered.provider is None:
        return
    problem = _problem(start, digests)
    if problem:
        raise registered.failure(problem)


def _problem(start: Start, digests: Mapping[str, str]) -> str | None:
    """What is wrong with a start, if anything."""
    for name, weight in start.weights.items():
        if weight_digest(weight) != digests[name]:
            return f"wrote to the base model's weights of {name}, which start.replaced_weights is for"
    for name, weight in start.replaced_weights.items():
        if name not in start.weights:
            return f"replaced the weights of {name}, which is no layer"
        shape = tuple(start.weights[name].shape)
        if tuple(weight.shape) != shape or weight.dtype != torch.float32 or not torch.isfinite(weight).all():
            return f"replaced the weights of {name} by a tensor that is not {shape}, float32 and finite"
    for name, quantizer in start.quantizers.items():
        for key, parameter in quantizer.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"left {key} of {name} with values that are not finite"
    return None
