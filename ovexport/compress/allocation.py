"""Which layer gets how many bits: the formats that cost least within a limit of bytes.

What a format costs a layer is 1/2 · tr(H_O · E · H_I · Eᵀ), with the error E that rounding leaves in it and the second
moments of the layer (see moments). These add up over the layers as long as errors are small. How far they are from the
truth differs from block to block more than within one, so each block is measured once: the divergence that all of its
layers cause in the recipe's format, over what the moments say, corrects the costs of its layers. An exact knapsack then
takes one format for each layer.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.compress.knapsack import Frontier, Option, frontier
from ovexport.compress.moments import Moments, moments_by_block
from ovexport.compress.roundings import Roundings
from ovexport.compress.successive import Curvature, Grid, refined
from ovexport.errors import RecipeError
from ovexport.models.architecture import Architecture
from ovexport.models.head import hidden_states
from ovexport.objectives.loss import divergence
from ovexport.recipe import CompressSpec
from ovexport.reports import BlockCorrection, FormatCost, FrontierPoint, LayerSensitivity, SensitivityReport
from ovexport.storage.records import read_record
from ovexport.weights.adapters import make_quantizer
from ovexport.weights.layer import LayerFormat
from ovexport.weights.policy import looked_up

logger = logging.getLogger(__name__)

_LARGEST_CORRECTION = 4.0
_MEASURED_SEQUENCES = 32
_POINTS = 32


@dataclass(frozen=True, slots=True)
class Choice:
    """One format for each layer.

    Attributes:
        layers: all of the model's.
        uniform: in the recipe's own format, or with one group size for all that had a choice, whichever takes as many
            bytes or the next fewer.
        sensitivities: of the layers that had a choice.
        left_out: names of those that would have had one and have no cost, as they are in no block or never ran.
    """

    layers: tuple[LayerFormat, ...]
    uniform: tuple[LayerFormat, ...]
    limit_bytes: int
    fixed_bytes: int
    sensitivities: tuple[LayerSensitivity, ...]
    left_out: tuple[str, ...]
    blocks: tuple[BlockCorrection, ...]
    frontier: tuple[FrontierPoint, ...]


@dataclass(frozen=True, slots=True)
class Measuring:
    """What the costs of formats are measured with.

    Attributes:
        calibration: token ids, (sequences, length), on the network's device.
        generator: draws the tokens that slopes are of; on the CPU.
        fixed: names of layers that the model's checkpoint holds as codes, and that are not rounded.
        weights_sha256: of the model's weights; costs in a file are of the same.
        roundings: takes every layer in each of its formats.
    """

    calibration: Tensor
    generator: torch.Generator
    fixed: Collection[str]
    weights_sha256: str
    roundings: Roundings


def weight_bytes(layers: Sequence[LayerFormat]) -> int:
    """Of all packed matrices."""
    return sum(layer.weight_bytes for layer in layers)


def limit_of(spec: CompressSpec, layers: Sequence[LayerFormat]) -> int:
    """The bytes that the packed matrices may take: what the recipe says, and 16 bits per weight at most.

    Args:
        layers: in the recipe's own format.
    """
    packed = [layer for layer in layers if layer.encoding]
    elements = sum(layer.out_features * layer.in_features for layer in packed)
    return int(min(_asked_bytes(spec, layers, elements), 2 * elements))


def _asked_bytes(spec: CompressSpec, layers: Sequence[LayerFormat], elements: int) -> float:
    if spec.bits_per_weight is not None:
        return spec.bits_per_weight / 8 * elements
    if spec.size_mb is not None:
        return spec.size_mb * 1e6
    assert spec.at_most_slower is not None
    names = looked_up(layers)
    rows_only = weight_bytes([layer for layer in layers if layer.name in names])
    return spec.at_most_slower * (weight_bytes(layers) - rows_only) + rows_only


def require_room(
    formats: Mapping[str, Sequence[LayerFormat]], layers: Sequence[LayerFormat], spec: CompressSpec
) -> int:
    """The limit of bytes.

    Raises:
        RecipeError: no layer has a choice, or not even the smallest formats are within it.
    """
    if not formats:
        raise RecipeError(
            f"compress.{spec.budget}={getattr(spec, str(spec.budget)):g}: no Linear layer is left to choose a format "
            "for; leave the budget out, or take layers out of compress.layers and compress.ignored"
        )
    limit = limit_of(spec, layers)
    smallest = sum(min(each.weight_bytes for each in formats.get(layer.name, (layer,))) for layer in layers)
    if smallest > limit:
        packed = sum(layer.out_features * layer.in_features for layer in layers if layer.encoding)
        raise RecipeError(
            f"compress.{spec.budget}={getattr(spec, str(spec.budget)):g}: the smallest formats take "
            f"{smallest / 1e6:.4g} MB, which is {8 * smallest / packed:.4g} bits per weight; allow as much, or leave "
            "layers out of compress.layers"
        )
    return limit


def choose_formats(
    network: PreTrainedModel,
    layers: tuple[LayerFormat, ...],
    formats: Mapping[str, Sequence[LayerFormat]],
    spec: CompressSpec,
    measuring: Measuring,
) -> Choice:
    """The formats that cost least within the recipe's budget.

    Args:
        network: float32, on the device that computes; its weights are the model's own again afterwards.
        layers: in the recipe's own format.
        formats: those that a layer can have, by name; its own is among them.
        measuring: what costs are measured with, unless a file has them.

    Raises:
        ArtifactError, RecipeError: as known_costs; or the budget is too small.
        UnsupportedModelError: as moments_by_block.
    """
    require_room(formats, layers, spec)
    known = known_costs(formats, spec, measuring.weights_sha256)
    costs, blocks = known or _costs(network, layers, formats, measuring)
    left_out = tuple(name for name in formats if name not in costs)
    formats = {name: formats[name] for name in costs}
    limit = require_room(formats, layers, spec)
    free = [layer for layer in layers if layer.name in costs]
    fixed_bytes = weight_bytes([layer for layer in layers if layer.name not in costs])
    options = [
        [Option(each.weight_bytes, cost) for each, cost in zip(formats[layer.name], costs[layer.name], strict=True)]
        for layer in free
    ]
    best = frontier(options)
    chosen = dict(zip((layer.name for layer in free), best.within(limit - fixed_bytes), strict=True))
    taken = {name: formats[name][index] for name, index in chosen.items()}
    return Choice(
        layers=tuple(taken.get(layer.name, layer) for layer in layers),
        uniform=uniform_within(layers, formats, limit),
        limit_bytes=limit,
        fixed_bytes=fixed_bytes,
        sensitivities=tuple(_sensitivity(name, formats[name], costs[name], chosen[name]) for name in chosen),
        left_out=left_out,
        blocks=blocks,
        frontier=_points(best),
    )


@torch.no_grad()
def round_formats(network: PreTrainedModel, choices: Iterable[Iterable[LayerFormat]], measuring: Measuring) -> None:
    """Round every layer in the formats that choices give it, in one pass over the text, and keep the roundings.

    Raises:
        UnsupportedModelError: as moments_by_block.
    """
    architecture = Architecture(network)
    wanted: dict[str, dict[LayerFormat, None]] = {}
    for layer in chain.from_iterable(choices):
        if layer.encoding and layer.name not in measuring.fixed:
            wanted.setdefault(layer.name, {})[layer] = None
    for moments in moments_by_block(network, list(wanted), measuring.calibration, measuring.generator):
        for name, of in moments.items():
            for _ in _in_formats(architecture.matrix(name).read(), of, tuple(wanted[name]), measuring):
                pass


def known_costs(
    formats: Mapping[str, Sequence[LayerFormat]], spec: CompressSpec, weights_sha256: str | None = None
) -> tuple[dict[str, list[float]], tuple[BlockCorrection, ...]] | None:
    """What each format costs each layer, by the file that the recipe names; None where it names none.

    Args:
        weights_sha256: of the model's weights; None where they are not read yet.

    Raises:
        ArtifactError: the file is corrupt.
        RecipeError: there is no such file, it lacks a layer or a format, or is of other weights.
    """
    if spec.sensitivities is None:
        return None
    given = f"compress.sensitivities={spec.sensitivities!r}"
    if not Path(spec.sensitivities).is_file():
        raise RecipeError(f"{given}: is no file; give the sensitivities.json of another run, or leave it out")
    report = read_record(Path(spec.sensitivities), SensitivityReport)
    if weights_sha256 not in (None, report.weights_sha256):
        raise RecipeError(f"{given}: was measured on other weights; give a file of this very model, or leave it out")
    costs: dict[str, list[float]] = {}
    of_layer = {layer.name: layer for layer in report.layers}
    missing_layers = [name.removesuffix(".weight") for name in formats if name not in {*of_layer, *report.left_out}]
    if missing_layers:
        others = f" and {len(missing_layers) - 1} more" if len(missing_layers) > 1 else ""
        raise RecipeError(
            f"{given}: has no costs of {missing_layers[0]}{others}; give a file of this model that was made with these "
            "layers free to choose, or leave it out"
        )
    for name in set(of_layer) & set(formats):
        known = {(each.mode, each.group_size, each.weight_bytes): each.cost_nats for each in of_layer[name].formats}
        try:
            costs[name] = [known[each.mode, each.group_size, each.weight_bytes] for each in formats[name]]
        except KeyError as missing:
            mode, group_size, size = missing.args[0]
            raise RecipeError(
                f"{given}: has no cost of {name.removesuffix('.weight')} in {mode} with group size {group_size} and "
                f"{size} bytes; give a file of this model with these formats, or leave it out"
            ) from None
    return {layer: costs[layer] for layer in formats if layer in costs}, report.blocks


@torch.no_grad()
def _costs(
    network: PreTrainedModel,
    layers: Sequence[LayerFormat],
    formats: Mapping[str, Sequence[LayerFormat]],
    measuring: Measuring,
) -> tuple[dict[str, list[float]], tuple[BlockCorrection, ...]]:
    """What each format costs each layer of the blocks, and what corrected it."""
    architecture = Architecture(network)
    own = {layer.name: layer for layer in layers if layer.encoding and layer.name not in measuring.fixed}
    costs: dict[str, list[float]] = {}
    blocks: list[BlockCorrection] = []
    measure = divergence_from(network, measuring.calibration[:_MEASURED_SEQUENCES])
    for moments in moments_by_block(network, list(own), measuring.calibration, measuring.generator):
        found: dict[str, list[float]] = {}
        values: dict[str, Tensor] = {}
        for name, of in moments.items():
            rounded = _in_formats(architecture.matrix(name).read(), of, formats.get(name, (own[name],)), measuring)
            for layer, cost, rounded_values in rounded:
                if name in formats:
                    found.setdefault(name, []).append(cost)
                if name in formats and layer == own[name]:
                    values[name] = rounded_values
        if not found:
            continue
        predicted = sum(found[name][formats[name].index(own[name])] for name in values)
        with other_weights(architecture, values):
            measured = measure()
        correction = min(max(measured / predicted, 1 / _LARGEST_CORRECTION), _LARGEST_CORRECTION) if predicted else 1.0
        costs |= {name: [correction * cost for cost in each] for name, each in found.items()}
        block = next(path for path in architecture.blocks() if next(iter(found)).startswith(f"{path}."))
        blocks.append(BlockCorrection(block=block, measured_nats=measured, predicted_nats=predicted))
        logger.info("  measured the formats of %s", block)
    return costs, tuple(reversed(blocks))


def _in_formats(
    weight: Tensor, moments: Moments, formats: Sequence[LayerFormat], measuring: Measuring
) -> Iterator[tuple[LayerFormat, float, Tensor]]:
    """Of each format, what it costs by the moments, and the values that a weight is rounded to, which are kept too."""
    curvature = Curvature.of(moments, formats[0].name)
    for layer in formats:
        quantizer = make_quantizer(layer).to(weight.device)
        quantizer.fit_grid(weight)
        values, grid = refined(weight, Grid.of(quantizer), curvature)
        measuring.roundings.keep(layer, values, grid)
        yield layer, max(0.0, moments.cost(weight - values)), values


def divergence_from(network: PreTrainedModel, tokens: Tensor) -> Callable[[], float]:
    """What measures the divergence from the network as it is now of the network as it is then, in nats per token."""
    head = Architecture(network).head()
    states = [hidden_states(network, row[None]) for row in tokens]

    def measure() -> float:
        total = sum(
            float(divergence(hidden_states(network, row[None]), state, head, head))
            for row, state in zip(tokens, states, strict=True)
        )
        return total / tokens.numel()

    return measure


@contextmanager
def other_weights(architecture: Architecture, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, some matrices of a model have other values."""
    before = {name: architecture.matrix(name).read().clone() for name in values}
    for name, value in values.items():
        architecture.matrix(name).write(value)
    try:
        yield
    finally:
        for name, value in before.items():
            architecture.matrix(name).write(value)


def uniform_within(
    layers: Sequence[LayerFormat], formats: Mapping[str, Sequence[LayerFormat]], limit: int
) -> tuple[LayerFormat, ...]:
    """The layers in the recipe's own format, or with one mode and group size for all that have a choice: the largest
    within the limit; where none is, the smallest.

    Args:
        layers: in the recipe's own format.
    """
    found = [tuple(layers)]
    for kind in sorted({kind for of in formats.values() for each in of for kind in _kinds(each)}):
        same = {name: next((each for each in of if kind in _kinds(each)), None) for name, of in formats.items()}
        if all(same.values()):
            found.append(tuple(same.get(layer.name) or layer for layer in layers))
    within = [each for each in found if weight_bytes(each) <= limit]
    return max(within, key=weight_bytes) if within else min(found, key=weight_bytes)


def _kinds(layer: LayerFormat) -> set[tuple[str, int]]:
    """Mode and group size; of one scale per output channel -1 as well, which layers of other widths share."""
    sizes = {layer.group_size, -1} if layer.group_size == layer.in_features else {layer.group_size}
    return {(layer.mode, size) for size in sizes}


def _sensitivity(name: str, formats: Sequence[LayerFormat], costs: Sequence[float], chosen: int) -> LayerSensitivity:
    return LayerSensitivity(
        name=name,
        formats=tuple(
            FormatCost(mode=each.mode, group_size=each.group_size, weight_bytes=each.weight_bytes, cost_nats=cost)
            for each, cost in zip(formats, costs, strict=True)
        ),
        chosen=chosen,
    )


def _points(best: Frontier) -> tuple[FrontierPoint, ...]:
    """Some points of the frontier, evenly spread over the sizes."""
    sizes = best.sizes_bytes
    wanted = torch.linspace(float(sizes[0]), float(sizes[-1]), _POINTS, dtype=torch.float64).numpy()
    at = sorted({int(index) for index in sizes.searchsorted(wanted, side="right") - 1})
    return tuple(FrontierPoint(weight_bytes=int(sizes[i]), cost_nats=float(best.costs[i])) for i in at)
