"""The weight matrices of a causal LM."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from ovexport.errors import UnsupportedModelError
from ovexport.storage.digests import bytes_digest
from ovexport.weights.layer import WeightMatrix


def weight_matrices(model: PreTrainedModel) -> tuple[WeightMatrix, ...]:
    """The weight matrices of Linear, Conv1D and Embedding layers, each once where it is shared.

    Raises:
        UnsupportedModelError: a layer keeps its weights in more than two dimensions, as fused experts do.
    """
    found = all_matrices(model)
    for unsuitable in (one for one in found if one.problem):
        raise UnsupportedModelError(f"{unsuitable.name}: {unsuitable.problem}")
    return found


def all_matrices(model: PreTrainedModel) -> tuple[WeightMatrix, ...]:
    """The weight matrices, those that can't be compressed included, each with its `problem`.

    Raises:
        UnsupportedModelError: there is none that can.
    """
    head = model.get_output_embeddings()
    seen: set[int] = set()
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D | nn.Embedding) or id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        transposed = isinstance(module, Conv1D)
        rows, columns = module.weight.shape
        kind = "embedding" if isinstance(module, nn.Embedding) else "head" if module is head else "linear"
        found.append(
            WeightMatrix(
                name=f"{path}.weight",
                kind=kind,  # type: ignore[arg-type]
                out_features=columns if transposed else rows,
                in_features=rows if transposed else columns,
                transposed=transposed,
            )
        )
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__}: has no Linear layer to compress")
    return (*found, *_stacked(model))


def _stacked(model: PreTrainedModel) -> Iterator[WeightMatrix]:
    """Weights in more than two dimensions, as fused experts and convolutions have them."""
    for name, parameter in model.named_parameters():
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


def matrix(model: PreTrainedModel, name: str, *, transposed: bool) -> Tensor:
    """A parameter's matrix as (output, input): a view, so writing to it writes to the model."""
    weight: Tensor = model.get_parameter(name).data
    return weight.T if transposed else weight


def compute_in(model: PreTrainedModel, kind: torch.dtype) -> None:
    """Keep the weight matrices in a type and everything else, what runs between them included, in float32."""
    matrices = {id(model.get_parameter(matrix.name)) for matrix in weight_matrices(model)}
    for value in model.parameters():
        value.data = value.data.to(kind if id(value) in matrices else torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _module, _inputs, output: output.float())


def parameter_of_hook(hook: str) -> str:
    """The parameter that a hook of NNCF's is on: "post_hooks.model:norm:weight__0.0" is on model.norm.weight."""
    _, _, operation = hook.partition(".")
    return operation.rpartition("__")[0].replace(":", ".")


def weight_digest(weight: Tensor) -> str:
    """SHA-256 of a matrix's bytes in its own dtype, row by row."""
    return bytes_digest(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
