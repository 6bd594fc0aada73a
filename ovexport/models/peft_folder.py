"""A checkpoint in the layout of PEFT's LoftQ examples: a float model with the codes' values, the adapter beside it."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.artifacts import Checkpoint
from ovexport.errors import RecipeError
from ovexport.models.loading import load_model, load_own_tokenizer
from ovexport.models.matrix_view import matrix_view
from ovexport.models.student import base_weights
from ovexport.recipe import ModelSpec
from ovexport.weights.adapters import load_quantizer
from ovexport.weights.layer import LayerFormat
from ovexport.weights.quantizer import Codes

LOFTQ_FOLDER = "loftq_init"


def write_peft_folder(checkpoint: Checkpoint, model: ModelSpec, out: Path) -> None:
    """Write the folder. The model that it holds, with the adapter in its folder `loftq_init` loaded by PEFT, gives the
    checkpoint's logits.

    Raises:
        RecipeError: every adapter of the checkpoint is absorbed, so that there is nothing beside its codes.
        ArtifactError, UnsupportedModelError: as load_backbone.
    """
    adapter = checkpoint.beside
    if adapter is None:
        raise RecipeError(
            f"--format peft: {checkpoint.path} has no adapter beside its codes; give a checkpoint that was tuned with "
            'compress.method = "lora"'
        )
    load_backbone(checkpoint, model).save_pretrained(out)
    load_own_tokenizer(model).save_pretrained(out)
    adapter.write(out / LOFTQ_FOLDER)


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
    for norm in checkpoint.manifest.norms:
        network.get_parameter(norm.name).copy_(torch.from_numpy(adapters.require(norm.name).copy()))
    return network


def _values(codes: Codes, layer: LayerFormat) -> Tensor:
    """What codes stand for, (output, input) float32."""
    grouped = codes.codes.float().reshape(layer.out_features, layer.groups, layer.group_size)
    if codes.zero_point is not None:
        grouped = grouped - codes.zero_point.float()
    return (grouped * codes.scale.float()).flatten(1)
