"""A checkpoint's model without its adapters: the float model whose weights are the codes' values."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.artifacts import Checkpoint
from ovexport.models.loading import load_model
from ovexport.models.matrix_view import matrix_view
from ovexport.models.student import base_weights
from ovexport.recipe import ModelSpec
from ovexport.weights.adapters import load_quantizer
from ovexport.weights.layer import LayerFormat
from ovexport.weights.quantizer import Codes


@torch.no_grad()
def load_backbone(checkpoint: Checkpoint, model: ModelSpec) -> PreTrainedModel:
    """The model in float32, which holds every value of 4-bit codes with float16 scales exactly.

    Raises:
        ArtifactError, UnsupportedModelError: the model can't be loaded, or the checkpoint is corrupt.
    """
    network = load_model(model, dtype=torch.float32)
    adapters = checkpoint.adapters
    own_weights = {layer.name: matrix_view(network, layer.name).read() for layer in checkpoint.manifest.layers}
    for layer, weight in base_weights(checkpoint, own_weights):
        codes = load_quantizer(layer, adapters).quantize(weight) if layer.encoding else None
        matrix_view(network, layer.name).write(weight if codes is None else _values(codes, layer))
    return network


def _values(codes: Codes, layer: LayerFormat) -> Tensor:
    """What codes stand for, (output, input) float32."""
    grouped = codes.codes.float().reshape(layer.out_features, layer.groups, layer.group_size)
    if codes.zero_point is not None:
        grouped = grouped - codes.zero_point.float()
    return (grouped * codes.scale.float()).flatten(1)
