"""A model with a LoRA adapter of PEFT's: whether they fit, and the sum of the two."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ovexport.artifacts import PeftAdapter
from ovexport.errors import ArtifactError, UnsupportedModelError
from ovexport.models.matrix_view import matrix_view
from ovexport.wording import shortened

_ROWS = 4096


def require_fits(adapter: PeftAdapter, network: PreTrainedModel, model_id: str) -> None:
    """Refuse an adapter of another model. What its configuration calls its base decides nothing: the names and shapes
    of the layers do.

    Args:
        network: the model, with or without weights.
        model_id: what the user calls it.

    Raises:
        ArtifactError: a layer is not in the model, or has another shape there.
        UnsupportedModelError: a layer is none whose weights can be added to.
    """
    cure = f"give the model that it was trained on{f', {shortened(adapter.base)}' if adapter.base else ''}"
    modules = dict(network.named_modules())
    absent = [layer.module for layer in adapter.layers if layer.module not in modules]
    if absent:
        raise ArtifactError(
            f"{adapter.name}: {len(absent)} of its {len(adapter.layers)} layers are not in {model_id}, such as "
            f"{shortened(absent[0])}; {cure}"
        )
    for layer in adapter.layers:
        module = modules[layer.module]
        if not isinstance(module, nn.Linear | Conv1D):
            raise UnsupportedModelError(
                f"{adapter.name}: adapts {layer.module}, a {type(module).__name__}; only LoRA of Linear layers is read"
            )
        if module.weight is network.get_input_embeddings().weight:
            raise UnsupportedModelError(
                f"{adapter.name}: adapts {layer.module}, whose weights are the embedding's too; train the adapter "
                "without it"
            )
        shape = tuple(matrix_view(network, f"{layer.module}.weight").read().shape)
        held = (len(layer.lora_B), layer.lora_A.shape[1])
        if held != shape:
            raise ArtifactError(
                f"{adapter.name}: {layer.module} has {held[0]} outputs and {held[1]} inputs, and in {model_id} "
                f"{shape[0]} and {shape[1]}; {cure}"
            )


@torch.no_grad()
def merge(adapter: PeftAdapter, network: PreTrainedModel, model_id: str) -> None:
    """Add an adapter to a model's weights: the sum in float64, rounded to float32, then to the model's own type.

    Raises:
        ArtifactError, UnsupportedModelError: as require_fits.
    """
    require_fits(adapter, network, model_id)
    for layer in adapter.layers:
        weight = matrix_view(network, f"{layer.module}.weight").read()
        lora_a, lora_b = torch.from_numpy(layer.lora_A).double(), torch.from_numpy(layer.lora_B)
        for begin in range(0, len(weight), _ROWS):
            rows = slice(begin, begin + _ROWS)
            change = lora_b[rows].double() @ lora_a
            weight[rows] = change.mul_(layer.factor).add_(weight[rows]).float().to(weight.dtype)
