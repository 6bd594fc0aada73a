"""Layers whose weight is stored with its inputs in another order: they read their inputs in that order."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class _Reordered:
    """A hook that puts what a layer is called with in another order.

    Args:
        order: of the inputs, (input,) int64.
    """

    def __init__(self, order: Tensor) -> None:
        self._order = order

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        values, *others = inputs
        if self._order.device != values.device:
            self._order = self._order.to(values.device)
        return (values.index_select(-1, self._order), *others)


def reorder_inputs(network: nn.Module, orders: Mapping[str, NDArray[np.int64]]) -> None:
    """Let layers read their inputs in another order, which their weights are stored in.

    A graph that is traced has a Gather of the activations for it; layers that read the same in the same order share it.

    Args:
        orders: of the inputs, (input,), by the name of the layer's weight.
    """
    shared: dict[bytes, _Reordered] = {}
    for name, order in orders.items():
        hook = shared.setdefault(order.tobytes(), _Reordered(torch.from_numpy(order)))
        network.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(hook)
