"""One weight matrix as (output, input), whatever holds it: on the PyTorch side, orientation ends here."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ovexport.storage.digests import bytes_digest

_ALL_ROWS = slice(None)


class MatrixView(ABC):
    """A weight matrix, (output, input), in the memory of the parameter that holds it.

    A view follows its parameter: where `parameter.data` becomes another tensor, of another type or on another device,
    that one is read and written from then on.

    Attributes:
        parameter: what holds the matrix.
        transposed: whether it holds it as (input, output).
    """

    transposed: ClassVar[bool]

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    @abstractmethod
    def oriented(self, stored: Tensor) -> Tensor:
        """A tensor with the parameter's layout, such as its gradient, as (output, input); it shares the memory."""

    def read(self, rows: slice = _ALL_ROWS) -> Tensor:
        """Rows of the matrix, (rows, input), in the parameter's type. They share its memory: what is written to them
        is written to the model."""
        return self.oriented(self.parameter.data)[rows]

    def write(self, values: Tensor) -> None:
        """Set the matrix to other values, (output, input), rounded to the parameter's type."""
        self.read().copy_(values)


class LinearMatrix(MatrixView):
    """The weight of a Linear or Embedding layer, which is stored as (output, input)."""

    transposed = False

    def oriented(self, stored: Tensor) -> Tensor:
        """As MatrixView."""
        return stored


class Conv1DMatrix(MatrixView):
    """The weight of GPT-2's Conv1D, which is stored as (input, output)."""

    transposed = True

    def oriented(self, stored: Tensor) -> Tensor:
        """As MatrixView."""
        return stored.T


def matrix_view(network: nn.Module, name: str) -> MatrixView:
    """The matrix that a parameter holds, such as "model.layers.0.mlp.down_proj.weight".

    Raises:
        AttributeError: the model has no such parameter.
    """
    holder = network.get_submodule(name.rpartition(".")[0])
    return (Conv1DMatrix if isinstance(holder, Conv1D) else LinearMatrix)(network.get_parameter(name))


def weight_digest(weight: Tensor) -> str:
    """SHA-256 of a matrix's bytes in its own dtype, row by row."""
    return bytes_digest(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
