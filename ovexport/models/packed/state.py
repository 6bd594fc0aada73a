"""A network's tensors, from a folder that holds some of them as codes."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovexport.errors import UnsupportedModelError
from ovexport.models.packed.folder import PackedFolder


def network_state(packed: PackedFolder, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, NDArray[np.int64]]]:
    """Every tensor of the model by its name, and the order of inputs, (input,), of the weights that are stored in one.

    Args:
        dtype: of the de-quantized weights.

    Raises:
        ArtifactError, UnsupportedModelError: as PackedFolder.grid; or a weight overflows the type.
    """
    state = {name: torch.from_numpy(np.array(values)) for name, values in packed.floats()}
    orders = {}
    for name in packed.layers:
        grid = packed.grid(name)
        weight = grid.dequantized(packed.codes(name, grid.order)).to(dtype)
        if not torch.isfinite(weight).all():
            raise UnsupportedModelError(
                f'{packed.origin}: {name} holds weights that overflow {dtype}; set model.dtype = "float32"'
            )
        state[name] = weight.T if packed.is_transposed(name) else weight
        if grid.order is not None:
            orders[name] = grid.order
    return state, orders
