"""A weight matrix is (output, input) on the PyTorch side, whatever layer holds it."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ovexport.models.matrix_view import Conv1DMatrix, LinearMatrix, MatrixView, matrix_view, weight_digest


def network(holder: str) -> nn.Module:
    """A model with one layer of 3 inputs and 5 outputs."""
    return nn.ModuleDict({"layer": nn.Linear(3, 5) if holder == "linear" else Conv1D(5, 3)})


@pytest.fixture(params=["linear", "conv1d"])
def view(request: pytest.FixtureRequest) -> MatrixView:
    return matrix_view(network(request.param), "layer.weight")


def test_the_layer_that_holds_a_matrix_decides_its_view() -> None:
    assert isinstance(matrix_view(network("linear"), "layer.weight"), LinearMatrix)
    assert isinstance(matrix_view(network("conv1d"), "layer.weight"), Conv1DMatrix)
    assert isinstance(matrix_view(nn.ModuleDict({"layer": nn.Embedding(5, 3)}), "layer.weight"), LinearMatrix)


def test_a_missing_parameter_is_refused() -> None:
    with pytest.raises(AttributeError):
        matrix_view(network("linear"), "layer.scale")


def test_what_is_written_is_read_and_computed_with(view: MatrixView) -> None:
    values = torch.arange(15.0).reshape(5, 3)
    view.write(values)

    assert torch.equal(view.read(), values)
    assert torch.equal(view.read(slice(1, 3)), values[1:3])
    layer = Conv1D(5, 3) if view.transposed else nn.Linear(3, 5)
    layer.weight, layer.bias = view.parameter, nn.Parameter(torch.zeros(5))
    assert torch.equal(layer(torch.eye(3)), values.T)


def test_what_is_read_shares_the_models_memory(view: MatrixView) -> None:
    view.read(slice(2, 3)).fill_(7)
    assert torch.equal(view.oriented(view.parameter.data)[2], torch.full((3,), 7.0))


def test_a_view_follows_its_parameter_to_other_memory(view: MatrixView) -> None:
    view.parameter.data = torch.zeros_like(view.parameter.data, dtype=torch.bfloat16)
    view.write(torch.ones(5, 3))
    assert view.read().dtype == torch.bfloat16
    assert view.parameter.data.sum() == 15


def test_the_digest_of_a_matrix_does_not_depend_on_its_layout() -> None:
    views = [matrix_view(network(holder), "layer.weight") for holder in ("linear", "conv1d")]
    for each in views:
        each.write(torch.arange(15.0).reshape(5, 3))
    assert weight_digest(views[0].read()) == weight_digest(views[1].read())
