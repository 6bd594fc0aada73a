"""QA-LoRA adapters of PEFT's: absorbed into the zero points of the 4-bit model that they were trained on.

PEFT adds alpha / rank · groups · B·A·mean(x) to a layer's output, with the mean of each group of inputs. Its own ways
of merging raise an error; here the codes and scales of the base stay as they are, and nothing is left of the adapter
but other zero points (see ovexport.weights.adapters.qalora).
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ovexport.artifacts import AdaptedLayer, Checkpoint, PeftAdapter, is_qalora
from ovexport.errors import ArtifactError, UnsupportedModelError
from ovexport.models.loading import open_packed
from ovexport.models.packed import PackedFolder
from ovexport.readers.reader import BaseWeights, CheckpointReader, ZeroPoints, readers
from ovexport.recipe import ModelSpec
from ovexport.weights.adapters import QaLoraQuantizer, make_quantizer
from ovexport.weights.encoding import encoding_of
from ovexport.weights.layer import LayerFormat, WeightMatrix
from ovexport.weights.policy import format_layer
from ovexport.weights.quantizer import TunableQuantizer

logger = logging.getLogger(__name__)


@readers.register("qalora")
class QaLoraReader(CheckpointReader):
    """A folder with a QA-LoRA adapter of PEFT's; the base model is a 4-bit one."""

    takes = "a folder with a QA-LoRA adapter"
    has_zero_points = True

    def recognizes(self, path: Path) -> bool:
        """As CheckpointReader."""
        return is_qalora(path)

    def read(self, path: Path, model: ModelSpec, out: Path, *, ranks: Sequence[int] | None) -> Checkpoint:
        """As CheckpointReader."""
        adapter = PeftAdapter.read_any(path)
        packed = open_packed(model)
        if packed is None:
            raise UnsupportedModelError(
                f"{model.id}: holds no 4-bit codes, and {path} is a QA-LoRA adapter, which changes zero points; give "
                "the GPTQ model that it was trained on"
            )
        base = BaseWeights.load(model)
        adapted = _by_layer(adapter, base.matrices, packed, model.id)
        layers = [_format(matrix, packed, adapted, self.zero_points) for matrix in packed.marked(base.matrices)]
        quantizers = {layer.name: _quantizer(layer, packed, adapted) for layer in layers if layer.encoding}
        if self.zero_points == "codes":
            _tell_what_is_lost(quantizers)
        checkpoint = base.write(out, layers, quantizers, {})
        packed.require_codes(layers, checkpoint.manifest.digests)
        return checkpoint


def _by_layer(
    adapter: PeftAdapter, matrices: Sequence[WeightMatrix], packed: PackedFolder, model_id: str
) -> dict[str, AdaptedLayer]:
    """Its layers by the weight that each is of, one input for each group of the base's.

    Raises:
        ArtifactError: a layer is not in the base model, or has another shape there.
        UnsupportedModelError: its groups are not the base model's, in its order.
    """
    shapes = {matrix.name: (matrix.out_features, matrix.in_features) for matrix in matrices}
    adapted = {}
    for layer in adapter.layers:
        name, where = f"{layer.module}.weight", f"{adapter.name}: {layer.module}"
        if name not in shapes:
            raise ArtifactError(f"{where}: no such layer in {model_id}; give the model that it was trained on")
        if name not in packed.layers:
            raise UnsupportedModelError(
                f"{where}: {model_id} holds no codes of this layer; train the adapter without it"
            )
        adapted[name] = _per_group(layer, where, shapes[name], adapter.pooled_inputs or 1, packed.group_size(name))
        if packed.grid(name).order is not None:
            raise UnsupportedModelError(
                f"{where}: the base model has its inputs in another order (act-order), so the groups of the adapter "
                "are not those of the zero points; train it on a model without desc_act"
            )
    return adapted


def _per_group(layer: AdaptedLayer, where: str, shape: tuple[int, int], pooled: int, group_size: int) -> AdaptedLayer:
    """A layer with one input for each of the base's groups, and PEFT's factor for their sum in place of the mean."""
    outputs, inputs = shape
    pools = inputs // pooled
    if layer.lora_A.shape[1] != pools or inputs % pooled or len(layer.lora_B) != outputs:
        raise ArtifactError(
            f"{where}: adapts a layer of {len(layer.lora_B)} x {layer.lora_A.shape[1] * pooled}, and the base model's "
            f"is {outputs} x {inputs}; give the model that it was trained on"
        )
    if pooled % group_size:
        raise UnsupportedModelError(
            f"{where}: qalora_group_size={pooled}, and the base model has a zero point for every {group_size} inputs, "
            f"so they can't take the adapter up; train it with qalora_group_size={group_size}"
        )
    return AdaptedLayer(
        module=layer.module,
        lora_A=np.repeat(layer.lora_A, pooled // group_size, axis=1),
        lora_B=layer.lora_B,
        factor=layer.factor * pools / pooled,
    )


def _format(
    matrix: WeightMatrix, packed: PackedFolder, adapted: Mapping[str, AdaptedLayer], zero_points: ZeroPoints
) -> LayerFormat:
    if matrix.own is None:
        return format_layer(matrix, "float")
    layer = adapted.get(matrix.name)
    if layer is None:
        return format_layer(matrix, matrix.own.mode, group_size=matrix.own.group_size, note=matrix.own.note)
    return format_layer(
        matrix,
        encoding_of(bits=4, zero_points=zero_points).mode,
        group_size=matrix.own.group_size,
        rank=layer.rank,
        adapter="qalora",
        adapter_factor=layer.factor,
        note=matrix.own.note,
    )


def _quantizer(layer: LayerFormat, packed: PackedFolder, adapted: Mapping[str, AdaptedLayer]) -> TunableQuantizer:
    quantizer = make_quantizer(layer)
    packed.grid(layer.name).set_on(quantizer)
    if layer.rank:
        with torch.no_grad():
            quantizer.lora_A.copy_(torch.from_numpy(adapted[layer.name].lora_A))
            quantizer.lora_B.copy_(torch.from_numpy(adapted[layer.name].lora_B))
    return quantizer


def _tell_what_is_lost(quantizers: Mapping[str, TunableQuantizer]) -> None:
    """Say how much of the adapter is lost by rounding the zero points to codes."""
    kept = [one.rounded_share() for one in quantizers.values() if isinstance(one, QaLoraQuantizer)]
    logger.warning(
        "  zero points as codes: rounding them changes %.0f %% of what the adapter adds (mean over the layers); "
        "--zero-points float16 keeps it",
        100 * float(np.mean(kept)),
    )
