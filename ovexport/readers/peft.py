"""LoRA adapters that PEFT trained on a float model: the model's codes, and the adapter beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ovexport.artifacts import AdaptedLayer, Checkpoint, PeftAdapter, is_peft_adapter, is_qalora
from ovexport.errors import UnsupportedModelError
from ovexport.models.adapted import require_fits
from ovexport.readers.reader import BaseWeights, CheckpointReader, readers
from ovexport.recipe import CompressSpec, ModelSpec
from ovexport.weights.adapters import BesideQuantizer
from ovexport.weights.layer import LayerFormat
from ovexport.weights.plan import plan_layers


@readers.register("peft")
class PeftReader(CheckpointReader):
    """A folder with a LoRA adapter of PEFT's.

    It holds no codes: the base model's are those of rounding to nearest, with the compression that a recipe has by
    default, and smaller groups where the default's do not suit.
    """

    takes = "a folder with adapter_config.json"

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
        planned = plan_layers(base.matrices, CompressSpec(fallback="smaller_group"))
        layers = [_format(layer, adapted.get(layer.name)) for layer in planned]
        quantizers = {layer.name: _quantizer(layer, base, adapted) for layer in layers if layer.encoding}
        return base.write(out, layers, quantizers, {})


def _format(layer: LayerFormat, adapted: AdaptedLayer | None) -> LayerFormat:
    """A layer's format with the adapter that PEFT's has for it, or without one."""
    if adapted is None:
        return layer.with_values(rank=0, note=None)
    return layer.with_values(rank=adapted.rank, adapter="beside", adapter_factor=adapted.factor, note=None)


def _quantizer(layer: LayerFormat, base: BaseWeights, adapted: Mapping[str, AdaptedLayer]) -> BesideQuantizer:
    quantizer = BesideQuantizer(layer)
    quantizer.fit_grid(base.weights[layer.name])
    if layer.rank:
        with torch.no_grad():
            quantizer.lora_A.copy_(torch.from_numpy(adapted[layer.name].lora_A))
            quantizer.lora_B.copy_(torch.from_numpy(adapted[layer.name].lora_B))
    return quantizer
