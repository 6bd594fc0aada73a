"""Adopt a checkpoint file of NNCF's two examples, FQ_LORA and FQ_LORA_NLS: write it as a checkpoint of ours.

Such a checkpoint keeps NNCF's arithmetic (`nncf_quantizer`): its codes, scales and zero points are those that the
examples' own export packs, each of them. What is taken over of a quantizer's ranges is what its fake quantizer clips
to: of an asymmetric one NNCF's `TuneRange` moves both ends until zero is on the grid.
"""

import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.artifacts import Checkpoint
from ovexport.errors import ArtifactError, RecipeError, UnsupportedModelError
from ovexport.models.matrix_view import matrix_view
from ovexport.readers.nncf_file import CURE, StoredQuantizer, dense_tensors, read_file, stored_quantizers
from ovexport.readers.reader import BaseWeights, CheckpointReader, readers
from ovexport.recipe import ModelSpec
from ovexport.weights.adapters import clipped_ranges
from ovexport.weights.encoding import encoding_of
from ovexport.weights.group_sizes import check_group_sizes
from ovexport.weights.layer import LayerFormat, WeightMatrix
from ovexport.weights.nncf_quantizer import NncfQuantizer, tuned_adapter

logger = logging.getLogger(__name__)

HOOKS_IN_MODEL_STATE = "__nncf_hooks."
_LARGEST_DEVIATION = 0.01
_ARCHIVE = b"PK"
"""The first bytes of what torch.save writes."""


@readers.register("nncf")
class NncfReader(CheckpointReader):
    """A checkpoint file of NNCF's two examples."""

    takes = "a file that NNCF's examples saved"
    has_ranks = True

    def recognizes(self, path: Path) -> bool:
        """As CheckpointReader: any archive of torch.save's."""
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(_ARCHIVE)) == _ARCHIVE

    def read(self, path: Path, model: ModelSpec, out: Path, *, ranks: Sequence[int] | None) -> Checkpoint:
        """As CheckpointReader."""
        return adopt(path, model, out, ranks=ranks)


def adopt(path: Path, model: ModelSpec, out: Path, *, ranks: Sequence[int] | None = None) -> Checkpoint:
    """Write an example's checkpoint file as a checkpoint of ours.

    A file without `model_state` does not tell its base model; names, shapes and the ranges of INT8 layers, which are
    not tuned, are compared.

    Args:
        ranks: of FQ_LORA_NLS adapters: one for all, or one per transformer block as the example configures them. The
            largest when None.

    Raises:
        ArtifactError: the file is no such checkpoint, is corrupt, or is of another base model.
        RecipeError: `ranks` does not suit the file.
        UnsupportedModelError: the base model can't be loaded, or the file holds what can't be represented, or what the
            runtime computes wrongly.
    """
    content, origin = read_file(path), str(path)
    stored = stored_quantizers(origin, content)
    active = _active_ranks(origin, stored, ranks)
    return write_adopted(origin, stored, content.get("model_state"), active, BaseWeights.load(model), out)


def write_adopted(
    origin: str,
    stored: Sequence[StoredQuantizer],
    state: Any,
    active: Mapping[str, int],
    base: BaseWeights,
    out: Path,
) -> Checkpoint:
    """Write what NNCF tuned as a checkpoint of ours.

    Args:
        origin: where it is from, for messages.
        state: the weights that the quantizers are on, by name; None where they are the base model's.
        active: the ranks in use of elastic adapters, by parameter.

    Raises:
        ArtifactError, UnsupportedModelError: as `adopt`.
    """
    model = base.spec
    by_layer = _by_layer(origin, stored, base.network, base.matrices, model)
    layers = tuple(_layer(each, by_layer.get(each.name), active, origin, model) for each in base.matrices)
    check_group_sizes(layers, origin)
    replaced = _replaced_weights(origin, state, base.network, layers, model)
    quantizers = {layer.name: _quantizer(origin, layer, by_layer[layer.name]) for layer in layers if layer.encoding}
    for name in quantizers:
        _check_ranges(origin, by_layer[name], replaced.get(name, base.weights[name]), model)
    return base.write(out, layers, quantizers, replaced)


def _active_ranks(origin: str, stored: Sequence[StoredQuantizer], ranks: Sequence[int] | None) -> dict[str, int]:
    """The ranks to use, by parameter as the file names it; empty when adapters are used whole.

    Raises:
        RecipeError: `ranks` are given for adapters of one rank, are too few or too many, or one is out of bounds.
    """
    elastic = [each for each in stored if each.quantizer_class.elastic]
    if not elastic and ranks is not None:
        raise RecipeError(f"--ranks: {origin} is no FQ_LORA_NLS checkpoint, its adapters have one rank; leave it out")
    if elastic and ranks is None:
        logger.warning(
            "  %s: adapters are used with their largest rank, %d: an FQ_LORA_NLS file does not tell which ranks were "
            "chosen; --ranks does",
            origin,
            max(each.rank for each in elastic),
        )
    if not elastic or ranks is None:
        return {}
    blocks = sorted({_block(each.parameter) for each in elastic})
    if len(ranks) not in (1, len(blocks)):
        raise RecipeError(
            f"--ranks: {len(ranks)} numbers, and {origin} has adapters in {len(blocks)} blocks; give one number for "
            f"all of them, or {len(blocks)}"
        )
    by_block = dict(zip(blocks, ranks if len(ranks) > 1 else [ranks[0]] * len(blocks), strict=True))
    active = {each.parameter: by_block[_block(each.parameter)] for each in elastic}
    for each in elastic:
        if not 1 <= active[each.parameter] <= each.rank:
            raise RecipeError(
                f"--ranks: {active[each.parameter]} for {each.parameter}, whose adapter has ranks 1 to {each.rank}"
            )
    return active


def _block(parameter: str) -> int:
    """The number of the transformer block that a parameter is in; what is in none counts as one block, the last."""
    number = re.search(r"\.(\d+)\.", parameter)
    return int(number[1]) if number else sys.maxsize


def _by_layer(
    origin: str,
    stored: Sequence[StoredQuantizer],
    network: PreTrainedModel,
    matrices: Sequence[WeightMatrix],
    model: ModelSpec,
) -> dict[str, StoredQuantizer]:
    """The quantizers by the layer of the model they are on; a weight that is shared is known under each of its names.

    Raises:
        ArtifactError: the model has no such layer, or one is quantized twice.
    """
    layer_of = _layer_names(network, [each.name for each in matrices])
    by_layer: dict[str, StoredQuantizer] = {}
    for each in stored:
        name = layer_of(each.parameter)
        if name is None:
            raise ArtifactError(
                f"{origin}: quantizes {each.parameter}, and {model.id} has no such weight matrix; "
                "give the base model that was tuned"
            )
        first = by_layer.setdefault(name, each)
        if first.quantizer_class != each.quantizer_class or any(
            not torch.equal(first.tensors[key], each.tensors[key]) for key in each.tensors
        ):
            raise ArtifactError(f"{origin}: quantizes {name} in two ways; {CURE}")
    return by_layer


def _layer_names(network: PreTrainedModel, layers: Sequence[str]) -> Callable[[str], str | None]:
    """From any name of a weight matrix to its layer's; None for what is no weight matrix."""
    names = {id(network.get_parameter(layer)): layer for layer in layers}
    parameters = dict(network.named_parameters(remove_duplicate=False))
    return lambda name: names.get(id(parameters[name])) if name in parameters else None


def _layer(
    each: WeightMatrix, stored: StoredQuantizer | None, active: Mapping[str, int], origin: str, model: ModelSpec
) -> LayerFormat:
    """The format of a layer as the file has it.

    Raises:
        ArtifactError: the layer has another shape in the file.
        UnsupportedModelError: the layer is stored as (input, output).
    """
    untouched = LayerFormat(
        name=each.name,
        kind=each.kind,
        mode="float",
        out_features=each.out_features,
        in_features=each.in_features,
        transposed=each.transposed,
        group_size=each.in_features,
    )
    if stored is None:
        return untouched
    if each.transposed:
        raise UnsupportedModelError(f"{each.name}: a Conv1D, whose quantizer can't be adopted; tune it with ovexport")
    scales = stored.scale_shape
    groups = scales[1] if len(scales) > 1 else 0
    columns = stored.tensors["lora_A"].shape[1] if stored.rank else each.in_features
    grids = ((each.out_features, groups), (each.out_features, groups, 1))
    if columns != each.in_features or not groups or columns % groups or scales not in grids:
        raise ArtifactError(
            f"{origin}: the scales of {each.name} are {scales} for {columns} inputs, and in {model.id} it "
            f"is ({each.out_features}, {each.in_features}); give the base model that was tuned"
        )
    return untouched.model_copy(
        update={
            "mode": encoding_of(
                bits=stored.quantizer_class.bits, zero_points="none" if stored.quantizer_class.symmetric else "codes"
            ).mode,
            "group_size": each.in_features // groups,
            "rank": stored.rank,
            "active_rank": active.get(stored.parameter),
            "arithmetic": "nncf",
        }
    )


def _quantizer(origin: str, layer: LayerFormat, stored: StoredQuantizer) -> NncfQuantizer:
    """The quantizer with the file's parameters.

    Raises:
        UnsupportedModelError: a scale of it overflows the float16 that ships.
    """
    grid = (layer.out_features, layer.groups, 1)
    kind = stored.quantizer_class
    clipped = clipped_ranges({name: stored.tensors[name] for name in kind.ranges}, bits=kind.bits, adapter=kind.adapter)
    tensors = {name: value.reshape(grid) for name, value in clipped.items()}
    encoding = layer.require_encoding()
    largest = tensors[stored.quantizer_class.ranges[-1]].abs().max() / max(-encoding.lowest, encoding.highest)
    if not largest.half().isfinite():
        raise UnsupportedModelError(
            f"{origin}: a scale of {layer.name} is {largest:.3g}, more than float16 can hold; lower the learning rate "
            "of scales and tune again"
        )
    if layer.rank:
        tensors |= tuned_adapter(layer, stored.tensors["lora_A"], stored.tensors["lora_B"])
    return NncfQuantizer(layer, tensors)


def _check_ranges(origin: str, stored: StoredQuantizer, weight: Tensor, model: ModelSpec) -> None:
    """Compare the ranges of an INT8 layer, which nobody tunes, with its weights.

    Raises:
        ArtifactError: they are of other weights.
    """
    if stored.rank:
        return
    low, high = weight.float().amin(1).clamp(max=0), weight.float().amax(1).clamp(min=0)
    expected = torch.maximum(-low, high) if stored.quantizer_class.symmetric else high - low
    actual = stored.tensors[stored.quantizer_class.ranges[-1]].float().abs().reshape(-1)
    used = expected > 0  # a padding token's row is zero, and its range arbitrary
    deviation = ((actual - expected).abs() / expected)[used]
    if len(deviation) and deviation.median() > _LARGEST_DEVIATION:
        raise ArtifactError(
            f"{origin}: its INT8 ranges of {stored.parameter} are not those of the weights in {model.id}, half of them "
            f"are more than {deviation.median():.1%} off; give the base model that was tuned"
        )


def _replaced_weights(
    origin: str, state: Any, network: PreTrainedModel, layers: Sequence[LayerFormat], model: ModelSpec
) -> dict[str, Tensor]:
    """The matrices of `model_state` that are not the base model's, (output, input) float32 by layer.

    Raises:
        ArtifactError: `model_state` is of another model.
        UnsupportedModelError: it changes what is no weight matrix, beyond rounding it to the file's type.
    """
    if state is None:
        return {}
    given = {
        name: value
        for name, value in dense_tensors(origin, "model_state", state).items()
        if not name.startswith(HOOKS_IN_MODEL_STATE)
    }
    base = network.state_dict()
    strangers = sorted(given.keys() ^ base.keys())
    if strangers:
        place = "not in its model_state" if strangers[0] in base else f"not in {model.id}"
        raise ArtifactError(f"{origin}: {strangers[0]} is {place}; give the base model that was tuned")
    by_name = {layer.name: layer for layer in layers}
    layer_of = _layer_names(network, list(by_name))
    replaced = {}
    for name, value in given.items():
        if value.shape != base[name].shape:
            raise ArtifactError(
                f"{origin}: {name} is {tuple(value.shape)} in its model_state and {tuple(base[name].shape)} in "
                f"{model.id}; give the base model that was tuned"
            )
        layer = by_name.get(layer_of(name) or "")
        if layer is None and not torch.equal(value, base[name].to(value.dtype)):
            raise UnsupportedModelError(
                f"{name}: changed in {origin}, and only weight matrices can be; tune without what changes it"
            )
        if layer is not None and not torch.equal(value.float(), given[layer.name].float()):
            raise ArtifactError(
                f"{origin}: {name} and {layer.name} are one in {model.id} and differ in its model_state"
            )
        if layer is not None and not torch.equal(value.float(), base[name].float()):
            replaced[layer.name] = matrix_view(network, layer.name).oriented(value).float().contiguous()
    return replaced
