"""LoftQ: codes and adapters that approximate the uncompressed weights together.

    Q_t    = the codes' values of W - factor · B_{t-1}·A_{t-1}          B_0·A_0 = 0
    B_t·A_t = the best approximation of that rank to W - Q_t             by singular values

The error ‖W - Q_t - factor · B_t·A_t‖ falls with each iteration or stays: a group keeps its former grid where the one
that its new extremes give rounds it worse, rounding to the nearest code of a grid is the best that the grid has, and so
is the truncated decomposition of its rank. Without the choice of grids nothing is assured, and the error rises on some
layers. The first iteration is plain rounding, so the error is below plain rounding's from the first on.

Source: Li et al., arXiv:2310.08659, algorithm 1; the choice of grids is ours.
"""

import torch
from torch import Tensor

from ovexport.compress.starting_points.starting_point import Start, StartingPoint
from ovexport.weights.adapters import BesideQuantizer

_SMALLEST = 1e-30
"""In the place of a singular value of 0, which is divided by."""


class Loftq(StartingPoint):
    """Alternate between rounding what the adapters leave and fitting the adapters to what rounding leaves."""

    replaces_weights = True

    def apply(self, start: Start) -> None:
        """As StartingPoint; layers without an adapter beside their codes stay as they are."""
        for name, quantizer in start.quantizers.items():
            if isinstance(quantizer, BesideQuantizer) and quantizer.layer.rank:
                weight = start.weight(name).float()
                rounded = alternate(weight, quantizer, start.spec.loftq_iterations)
                if rounded is not weight:
                    start.replaced_weights[name] = rounded


@torch.no_grad()
def alternate(weight: Tensor, quantizer: BesideQuantizer, iterations: int) -> Tensor:
    """Set a quantizer's grid and adapter.

    Args:
        weight: (output, input) float32; the quantizer has the grid that rounding to nearest gives it.

    Returns:
        What the codes are those of, in the shape of `weight`: the weight itself after one iteration.
    """
    rounded = weight
    for iteration in range(iterations):
        if iteration:
            rounded = weight - quantizer.product()
            _choose_grids(rounded, quantizer)
        _fit_adapter(weight - quantizer.base(rounded), quantizer)
    return rounded


def _choose_grids(weight: Tensor, quantizer: BesideQuantizer) -> None:
    """Give each group the grid of its extremes, or leave it the one it has, whichever rounds it better."""
    former = {name: getattr(quantizer, name).detach().clone() for name in quantizer.range_names}
    before = _group_errors(weight, quantizer)
    quantizer.fit_grid(weight)
    kept = _group_errors(weight, quantizer) >= before
    for name, values in former.items():
        parameter = getattr(quantizer, name)
        parameter.copy_(torch.where(kept, values, parameter))


def _group_errors(weight: Tensor, quantizer: BesideQuantizer) -> Tensor:
    """Squared error of each group's rounding, (output, groups, 1)."""
    layer = quantizer.layer
    errors = (weight - quantizer.base(weight)).double().square_()
    return errors.reshape(layer.out_features, layer.groups, layer.group_size).sum(-1, keepdim=True)


def _fit_adapter(residual: Tensor, quantizer: BesideQuantizer) -> None:
    """Set the adapter so that its product is the nearest of its rank to a matrix, (output, input).

    That is the matrix's projection on its largest singular vectors. They are eigenvectors of the product with its own
    transpose on the smaller side, which are found several times faster than all singular values.
    """
    wide = residual.shape[0] <= residual.shape[1]
    matrix = (residual if wide else residual.T).double()
    vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -quantizer.layer.rank :]
    projected = vectors.T @ matrix
    roots = projected.norm(dim=1).clamp(min=_SMALLEST).sqrt()  # of the singular values: both factors weigh the same
    factor = quantizer.layer.adapter_factor**-0.5
    first, second = vectors * roots * factor, projected / roots[:, None] * factor
    quantizer.lora_B.copy_(first if wide else second.T)
    quantizer.lora_A.copy_(second if wide else first.T)
