"""The uncompressed model, before its weights become those of a checkpoint."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from ovexport.models.architecture import Architecture, compute_in
from ovexport.models.device import Compute
from ovexport.models.head import Head
from ovexport.models.loading import load_model
from ovexport.recipe import ModelSpec
from ovexport.weights.layer import LayerFormat


@dataclass(frozen=True, slots=True)
class UncompressedModel:
    """A loaded model.

    Attributes:
        network: computes as its `Compute` says.
        head: its own, which stays the uncompressed one when the network becomes a student.
        own_weights: by layer, (output, input), in the type that the model stores them in.
    """

    network: PreTrainedModel
    head: Head
    own_weights: dict[str, Tensor]


def load_uncompressed(model: ModelSpec, layers: Iterable[LayerFormat], compute: Compute) -> UncompressedModel:
    """Load the model that a checkpoint's layers are of.

    Raises:
        UnsupportedModelError: it can't be loaded.
    """
    network = load_model(model).to(compute.device)
    architecture = Architecture(network)
    own_weights = {layer.name: architecture.matrix(layer.name).read() for layer in layers}
    compute_in(network, compute.dtype)
    head = architecture.head()
    return UncompressedModel(network, head, own_weights)
