"""What a causal LM is made of, as far as compressing and tuning go: its weight matrices, its blocks and its head."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ovexport.errors import UnsupportedModelError
from ovexport.models.blocks import Block, decoder_blocks, walk_blocks
from ovexport.models.head import Head
from ovexport.models.matrix_view import MatrixView, matrix_view
from ovexport.weights.layer import WeightMatrix


@dataclass(frozen=True, slots=True)
class Architecture:
    """The parts of a causal LM of transformers.

    Attributes:
        network: the model itself; its parts are looked up in it whenever they are asked for.
    """

    network: PreTrainedModel

    def matrices(self) -> tuple[WeightMatrix, ...]:
        """The weight matrices of Linear, Conv1D and Embedding layers, each once where it is shared.

        Raises:
            UnsupportedModelError: a layer keeps its weights in more than two dimensions, as fused experts do, or there
                is no matrix at all.
        """
        matrices = self.all_matrices()
        for unsuitable in (matrix for matrix in matrices if matrix.problem):
            raise UnsupportedModelError(f"{unsuitable.name}: {unsuitable.problem}")
        return matrices

    def all_matrices(self) -> tuple[WeightMatrix, ...]:
        """The weight matrices, those that can't be compressed included, each with its `problem`.

        Raises:
            UnsupportedModelError: there is none that can.
        """
        matrices = tuple(self._layers())
        if not matrices:
            raise UnsupportedModelError(f"{type(self.network).__name__}: has no Linear layer to compress")
        return (*matrices, *self._stacked())

    def matrix(self, name: str) -> MatrixView:
        """The matrix of that name, to read and to write as (output, input)."""
        return matrix_view(self.network, name)

    def blocks(self) -> dict[str, nn.Module]:
        """The decoder's blocks by name, such as "model.layers.0", in their order.

        Raises:
            UnsupportedModelError: there is no list of them.
        """
        return decoder_blocks(self.network)

    def walk_blocks(self, tokens: Tensor) -> Iterator[Block]:
        """The decoder's blocks in their order, each with what it is called with on a text; see blocks.walk_blocks.

        Args:
            tokens: token ids, (sequences, length) int64.
        """
        return walk_blocks(self.network, tokens)

    def head(self) -> Head:
        """What turns the last hidden states into logits, on the weights that the model has now."""
        return Head.of(self.network)

    def _layers(self) -> Iterator[WeightMatrix]:
        head = self.network.get_output_embeddings()
        seen: set[int] = set()
        for path, module in self.network.named_modules():
            if not isinstance(module, nn.Linear | Conv1D | nn.Embedding) or id(module.weight) in seen:
                continue
            seen.add(id(module.weight))
            view = self.matrix(f"{path}.weight")
            out_features, in_features = view.read().shape
            yield WeightMatrix(
                name=f"{path}.weight",
                kind="embedding" if isinstance(module, nn.Embedding) else "head" if module is head else "linear",
                out_features=out_features,
                in_features=in_features,
                transposed=view.transposed,
            )

    def _stacked(self) -> Iterator[WeightMatrix]:
        """Weights in more than two dimensions, as fused experts and convolutions have them."""
        for name, parameter in self.network.named_parameters():
            if parameter.ndim > 2:
                shape = tuple(parameter.shape)
                yield WeightMatrix(
                    name=name,
                    kind="linear",
                    out_features=math.prod(shape[:-1]),
                    in_features=shape[-1],
                    problem=f"weights of shape {shape}; only Linear, Conv1D and Embedding layers can be compressed, so "
                    "mixtures of experts and convolutions can't be done",
                )


def compute_in(network: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep the weight matrices in a type and everything else, what runs between them included, in float32."""
    architecture = Architecture(network)
    matrices = {id(architecture.matrix(matrix.name).parameter) for matrix in architecture.matrices()}
    for value in network.parameters():
        value.data = value.data.to(dtype if id(value) in matrices else torch.float32)
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _module, _inputs, output: output.float())


def hook_of_parameter(name: str) -> str:
    """The hook of NNCF's that is on a parameter: "post_hooks.model:norm:weight__0.0" for model.norm.weight."""
    return f"post_hooks.{name.replace('.', ':')}__0.0"


def parameter_of_hook(hook: str) -> str:
    """The parameter that a hook of NNCF's is on: "post_hooks.model:norm:weight__0.0" is on model.norm.weight."""
    _, _, operation = hook.partition(".")
    return operation.rpartition("__")[0].replace(":", ".")
