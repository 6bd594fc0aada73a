"""LoRA adapters that PEFT trained: the base model's codes, and the adapter beside them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ovexport.artifacts import AdaptedLayer, Checkpoint, PeftAdapter, is_peft_adapter, is_qalora
from ovexport.errors import UnsupportedModelError
from ovexport.models.adapted import require_fits
from ovexport.models.loading import open_packed
from ovexport.models.packed import PackedFolder
from ovexport.readers.reader import BaseWeights, CheckpointReader, readers
from ovexport.recipe import CompressSpec, ModelSpec
from ovexport.weights.adapters import BesideQuantizer
from ovexport.weights.layer import LayerFormat
from ovexport.weights.plan import plan_layers
from ovexport.weights.policy import format_layer

_DEFAULTS = CompressSpec(fallback="smaller_group", rank=1)
"""For the formats alone: ranks are the adapter's."""


@readers.register("peft")
class PeftReader(CheckpointReader):
    """A folder with a LoRA adapter of PEFT's.

    It holds no codes. Those of a base model in 4 bits are kept, its other layers in floating point; a float model's are
    those of rounding to nearest, with the compression that a recipe has by default, and smaller groups where the
    default's do not suit.
    """

    takes = "a folder with a LoRA adapter"

    def recognizes(self, path: Path) -> bool:
        """As CheckpointReader."""
        return is_peft_adapter(path) and not is_qalora(path)

    def read(self, path: Path, model: ModelSpec, out: Path, *, ranks: Sequence[int] | None) -> Checkpoint:
        """As CheckpointReader.

        Raises:
            UnsupportedModelError: it is no plain LoRA of Linear layers, or was never trained.
        """
        adapter = PeftAdapter.read(path)
        if not any(np.any(layer.folded.lora_B) for layer in adapter.layers):
            raise UnsupportedModelError(
                f"{path}: every lora_B times its factor is 0, so it adds nothing; give an adapter that was trained"
            )
        base = BaseWeights.load(model)
        require_fits(adapter, base.network, model.id)
        adapted = {f"{layer.module}.weight": layer for layer in adapter.layers}
        packed = open_packed(model)
        planned = _packed_formats(packed, base, adapted) if packed else plan_layers(base.matrices, _DEFAULTS)
        layers = [_format(layer, adapted.get(layer.name)) for layer in planned]
        quantizers = {layer.name: _quantizer(layer, base, adapted) for layer in layers if layer.encoding}
        if packed is None:
            return base.write(out, layers, quantizers, {})
        for name, quantizer in quantizers.items():
            packed.grid(name).set_on(quantizer)
        checkpoint = base.write(out, layers, quantizers, {})
        packed.require_codes(layers, checkpoint.manifest.digests)
        return checkpoint


def _packed_formats(packed: PackedFolder, base: BaseWeights, adapted: Iterable[str]) -> list[LayerFormat]:
    """The formats that a model in 4 bits has.

    Args:
        adapted: names of the layers that have an adapter.

    Raises:
        UnsupportedModelError: one of them has no codes.
    """
    without = sorted(set(adapted) - set(packed.layers))
    if without:
        raise UnsupportedModelError(
            f"{base.spec.id}: holds no codes of {without[0]}, which the adapter is of; train the adapter without it"
        )
    return [
        format_layer(matrix, matrix.own.mode, group_size=matrix.own.group_size, note=matrix.own.note)
        if matrix.own
        else format_layer(matrix, "float")
        for matrix in packed.marked(base.matrices)
    ]


def _format(layer: LayerFormat, adapted: AdaptedLayer | None) -> LayerFormat:
    """A layer's format with the adapter that PEFT's has for it, or without one."""
    if adapted is None:
        return layer.with_values(rank=0)
    return layer.with_values(rank=adapted.rank, adapter="beside", adapter_factor=adapted.factor)


def _quantizer(layer: LayerFormat, base: BaseWeights, adapted: Mapping[str, AdaptedLayer]) -> BesideQuantizer:
    quantizer = BesideQuantizer(layer)
    quantizer.fit_grid(base.weights[layer.name])
    if layer.rank:
        with torch.no_grad():
            quantizer.lora_A.copy_(torch.from_numpy(adapted[layer.name].lora_A))
            quantizer.lora_B.copy_(torch.from_numpy(adapted[layer.name].lora_B))
    return quantizer
