"""The weights and biases of a model's normalization layers, and how each layer uses them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ovexport.errors import UnsupportedModelError
from ovexport.storage.digests import bytes_digest
from ovexport.weights.norm import TunedNorm

_ROWS = 3
"""Of the input that a layer is tried with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A parameter of a normalization layer.

    Attributes:
        name: in the model.
        added: what the layer adds to it before it is used: 1 in Gemma's (1 + weight), 0 elsewhere.
        problem: why it can't be tuned; None where it can.
    """

    name: str
    parameter: nn.Parameter
    added: Literal[0, 1] = 0
    problem: str | None = None

    def used_values(self) -> NDArray[np.float32]:
        """What the layer multiplies with or adds, in float32, as a traced graph holds it."""
        values: NDArray[np.float32] = (self.parameter.detach().float() + self.added).cpu().contiguous().numpy()
        return values

    def record(self) -> TunedNorm:
        """What a checkpoint records of it, while the parameter has the base model's values."""
        return TunedNorm(
            name=self.name,
            shape=tuple(self.parameter.shape),
            added=self.added,
            base_digest=bytes_digest(self.used_values()),
        )


def find_norms(network: PreTrainedModel) -> tuple[Norm, ...]:
    """Every parameter of the model's normalization layers, in the model's order."""
    found: list[Norm] = []
    for path, module in network.named_modules(remove_duplicate=False):
        if "norm" in type(module).__name__.lower():
            found += _norms_of(path, module)
    shared = [id(norm.parameter) for norm in found]
    return tuple(
        Norm(name=norm.name, parameter=norm.parameter, problem="several layers share it")
        if shared.count(id(norm.parameter)) > 1
        else norm
        for norm in found
    )


def require_norms(network: PreTrainedModel) -> tuple[Norm, ...]:
    """As `find_norms`, where all of them can be tuned.

    Raises:
        UnsupportedModelError: there is none, or one can't be tuned.
    """
    norms = find_norms(network)
    if not norms:
        raise UnsupportedModelError(
            f"{type(network).__name__}: no normalization layer of it has weights; set tune.norms = false"
        )
    for norm in norms:
        if norm.problem:
            raise UnsupportedModelError(f"{norm.name}: can't be tuned, {norm.problem}; set tune.norms = false")
    return norms


def _norms_of(path: str, module: nn.Module) -> Iterator[Norm]:
    for key, parameter in module.named_parameters(recurse=False):
        name = f"{path}.{key}"
        added = _added(module, key)
        if added is None:
            yield Norm(name=name, parameter=parameter, problem="its layer uses it in a way that is not known")
        else:
            yield Norm(name=name, parameter=parameter, added=added)


@torch.no_grad()
def _added(module: nn.Module, key: str) -> Literal[0, 1] | None:
    """What a layer adds to a parameter before it is used; None where that is no layer of the kind
    normalized · (added + weight) + bias. The layer is tried with other parameters than its own."""
    weight = next(iter(module.parameters(recurse=False)))
    inputs = torch.randn(_ROWS, *weight.shape, generator=torch.Generator().manual_seed(0))
    try:
        at_0, at_1, at_2 = (_output(module, inputs, key, value) for value in (0.0, 1.0, 2.0))
    except Exception:  # a layer that is called otherwise, of a model's own code, raises anything at all
        return None
    slope = at_1 - at_0
    if at_0.shape != inputs.shape or not slope.any() or not torch.allclose(at_2 - at_1, slope, atol=1e-5):
        return None
    if key == "bias":
        return 0 if torch.allclose(slope, torch.ones_like(slope), atol=1e-5) else None
    if torch.allclose(at_0, torch.zeros_like(at_0), atol=1e-5):
        return 0
    return 1 if torch.allclose(at_0, slope, atol=1e-5) else None


def _output(module: nn.Module, inputs: Tensor, key: str, value: float) -> Tensor:
    """What a layer gives with one parameter that is a value everywhere and others that are 0."""
    parameters = {
        name: torch.full(tuple(other.shape), value if name == key else 0.0)
        for name, other in module.named_parameters(recurse=False)
    }
    output: Tensor = torch.func.functional_call(module, parameters, (inputs,))
    return output
