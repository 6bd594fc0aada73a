"""The stage: the format of every layer, then the starting points, one after the other. It leaves the checkpoint that
tuning begins from, which is the plain twin's as well."""

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.artifacts import Checkpoint, PreparedData
from ovexport.compress.allocation import (
    Choice,
    Measuring,
    choose_formats,
    divergence_from,
    other_weights,
    round_formats,
    weight_bytes,
)
from ovexport.compress.roundings import Roundings
from ovexport.compress.starting_points import Start, StartingPoint, chosen
from ovexport.errors import UnsupportedModelError
from ovexport.models.architecture import Architecture
from ovexport.models.checkpoint import write_checkpoint
from ovexport.models.device import Compute, require_device
from ovexport.models.loading import load_model, open_packed
from ovexport.models.matrix_view import weight_digest
from ovexport.models.packed import PackedFolder, PackedGrid
from ovexport.recipe import CompressSpec, ModelSpec
from ovexport.registry import Registered
from ovexport.reports import HeldOut, SensitivityReport
from ovexport.storage.digests import json_digest
from ovexport.storage.records import write_record
from ovexport.storage.scratch import scratch_folder
from ovexport.versions import stack_versions
from ovexport.weights.adapters import make_quantizer
from ovexport.weights.layer import LayerFormat
from ovexport.weights.plan import plan_layers
from ovexport.weights.policy import candidate_formats
from ovexport.weights.ranks import RankSpace

logger = logging.getLogger(__name__)


def compress(
    model: ModelSpec, spec: CompressSpec, data: PreparedData, seed: int, out: Path, *, sensitivities: Path | None = None
) -> Checkpoint:
    """Decide the format of every layer and find its starting codes.

    Args:
        data: calibrates starting points that need text, and a budget's choice of formats, which is checked on the
            validation text.
        seed: of the adapters' random side.
        sensitivities: file that takes how a budget chose the formats; without a budget there is none.

    Raises:
        RecipeError: a layer's in-features can't be grouped as asked, a budget is too small, or the device is not there.
        PlugInError: a plug-in fails, or leaves what is no starting point.
        UnsupportedModelError: a layer can't be compressed, or holds weights that are not finite or too large for
            float16 scales.
    """
    require_device(spec.device, "compress.device")
    network = load_model(model)
    packed = open_packed(model)
    matrices = Architecture(network).matrices()
    matrices = tuple(packed.marked(matrices)) if packed else matrices
    layers = plan_layers(matrices, spec)
    _tell(layers)
    _require_finite(network)
    base = _Base.of(network, packed, layers, spec, data, seed)
    if spec.budget is None:
        start = base.started(network, layers)
        report = None
    else:
        with scratch_folder(out.parent) as folder:
            start, report = _within_budget(base, network, layers, model, data, Roundings(folder))
    ranks = RankSpace.of(start.layers, spec.rank_space or (), spec.rank_by).ranks
    made = (base.digests, start.weights, start.quantizers, start.replaced_weights)
    checkpoint = write_checkpoint(out, model, tuple(start.layers), *made, rank_space=ranks, rank_by=spec.rank_by)
    if report is not None and sensitivities is not None:
        write_record(report, sensitivities)
    if packed:
        packed.require_codes(checkpoint.manifest.layers, checkpoint.manifest.digests)
    return checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """What starting points begin from, whatever the layers' formats.

    Attributes:
        weights: of the base model by layer, (output, input), in its own type.
        digests: of their bytes.
    """

    spec: CompressSpec
    seed: int
    points: tuple[Registered[type[StartingPoint]], ...]
    weights: dict[str, Tensor]
    digests: dict[str, str]
    calibration: Tensor
    own_grids: dict[str, PackedGrid]

    @classmethod
    def of(
        cls,
        network: PreTrainedModel,
        packed: PackedFolder | None,
        layers: Sequence[LayerFormat],
        spec: CompressSpec,
        data: PreparedData,
        seed: int,
    ) -> "_Base":
        """Of a model as it was loaded."""
        architecture = Architecture(network)
        weights = {layer.name: architecture.matrix(layer.name).read() for layer in layers}
        points = chosen(spec)
        return cls(
            spec=spec,
            seed=seed,
            points=points,
            weights=weights,
            digests={name: weight_digest(weight) for name, weight in weights.items()},
            calibration=_calibration(points, data, spec),
            own_grids={name: packed.grid(name) for name in packed.layers} if packed else {},
        )

    def started(
        self, network: PreTrainedModel, layers: tuple[LayerFormat, ...], roundings: Roundings | None = None
    ) -> Start:
        """The start that the recipe's starting points make of a model, which they may change.

        Args:
            roundings: of all layers in these formats, if there are any.
        """
        start = Start(
            network=network,
            spec=self.spec,
            layers=layers,
            weights=self.weights,
            quantizers={layer.name: make_quantizer(layer) for layer in layers if layer.encoding},
            generator=torch.Generator().manual_seed(self.seed),
            calibration=self.calibration,
            own_grids=self.own_grids,
            roundings=roundings,
        )
        for registered in self.points:
            _apply(registered, start, self.digests)
        return start


def _within_budget(
    base: _Base,
    network: PreTrainedModel,
    layers: tuple[LayerFormat, ...],
    model: ModelSpec,
    data: PreparedData,
    roundings: Roundings,
) -> tuple[Start, SensitivityReport]:
    """The start with the formats that a budget chooses, or with one format for all if that is within the budget and
    diverges less on the validation text.

    Args:
        roundings: takes the layers in all of their formats.
    """
    spec = base.spec
    device = Compute.of(spec.device, "fp32").device
    computing = copy.deepcopy(network).float().to(device)
    formats = candidate_formats(layers, spec, base.own_grids)
    validation = torch.from_numpy(data.tokens("validation").astype(np.int64)).to(device)
    measure = divergence_from(computing, validation)
    starts: list[Start] = []
    nats: list[float] = []
    generator = torch.Generator().manual_seed(base.seed)
    weights_sha256 = json_digest(base.digests)
    measuring = Measuring(base.calibration.to(device), generator, base.own_grids, weights_sha256, roundings)
    choice = choose_formats(computing, layers, formats, spec, measuring)
    if not roundings and spec.rounding == "two_sided":  # the costs were known
        round_formats(computing, (choice.layers, choice.uniform), measuring)
    for given, model_of_start in ((choice.layers, copy.deepcopy(network)), (choice.uniform, network)):
        starts.append(base.started(model_of_start, given, roundings or None))
        with other_weights(Architecture(computing), _shipped(starts[-1])):
            nats.append(measure())
    mixed = nats[0] <= nats[1] or weight_bytes(choice.uniform) > choice.limit_bytes
    logger.info(
        "  validation text: %.5f nats with the formats chosen within %.2f MB, %.5f with one format for all; %s",
        nats[0],
        choice.limit_bytes / 1e6,
        nats[1],
        "the chosen ones are taken" if mixed else "the one format is taken",
    )
    return starts[0 if mixed else 1], _report(choice, nats, model, weights_sha256, mixed=mixed)


def _report(
    choice: Choice, nats: Sequence[float], model: ModelSpec, weights_sha256: str, *, mixed: bool
) -> SensitivityReport:
    """How the formats were chosen.

    Args:
        nats: on the validation text, of the chosen formats and of one format for all.
        mixed: the chosen formats are taken.
    """
    free = {each.name for each in choice.sensitivities}
    grouped = (one for one in choice.uniform if one.name in free and one.group_size < one.in_features)
    return SensitivityReport(
        model_id=model.id,
        weights_sha256=weights_sha256,
        limit_bytes=choice.limit_bytes,
        fixed_bytes=choice.fixed_bytes,
        layers=choice.sensitivities,
        left_out=choice.left_out,
        blocks=choice.blocks,
        frontier=choice.frontier,
        held_out=HeldOut(
            chosen_nats=nats[0],
            chosen_weight_bytes=weight_bytes(choice.layers),
            uniform_nats=nats[1],
            uniform_weight_bytes=weight_bytes(choice.uniform),
            uniform_group_size=next((layer.group_size for layer in grouped), -1),
        ),
        taken="chosen" if mixed else "uniform",
        versions=stack_versions(),
    )


def _shipped(start: Start) -> dict[str, Tensor]:
    """The weights that ship of a start, by layer, float32."""
    shipped: dict[str, Tensor] = {}
    for name, quantizer in start.quantizers.items():
        weight = start.weight(name)
        shipped[name] = torch.empty(weight.shape, dtype=torch.float32)
        quantizer.dequantize_into(weight, shipped[name])
    return shipped


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
    """Sequences of the training text, evenly spread, (sequences, length) int64; none where nothing needs text."""
    if spec.budget is None and not any(registered.thing.needs_text for registered in points):
        return torch.empty(0, 0, dtype=torch.int64)
    return torch.from_numpy(evenly_spread(data.tokens("train"), spec.calibration_sequences)).long()


def evenly_spread(tokens: NDArray[np.int32], count: int) -> NDArray[np.int32]:
    """So many of the sequences, (sequences, length), from the first to the last; all where there are no more."""
    rows = np.linspace(0, len(tokens) - 1, min(count, len(tokens))).round().astype(int)
    return np.take(tokens, rows, axis=0)


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
