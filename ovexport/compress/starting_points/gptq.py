"""GPTQ's rounding as a starting point: the weights are changed so that plain rounding gives its codes.

Frantar et al., arXiv:2210.17323: columns are rounded one after the other, and the error of each is made up for in those
that are still to come, as far as the layer's inputs tell (H = X·Xᵀ over calibration text). Columns with the most
energetic inputs come first, on scales and zero points that are settled before ("act-order" with static groups).

The weights that tuning adds its adapters to lie half way between what a column was when it was rounded and the value
that its code stands for. At the former, many codes flip with the first small change, and what GPTQ had made up for is
lost; at the latter, nothing says which of them would flip at little cost.

Blocks of the decoder are done in their order, each on what the rounded ones before it give.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.compress.starting_points.starting_point import Start, StartingPoint, starting_points
from ovexport.errors import UnsupportedModelError
from ovexport.models.architecture import Architecture
from ovexport.weights.layer import LayerFormat
from ovexport.weights.quantizer import TunableQuantizer

_DAMPING = 0.01
_SHARE_KEPT = 0.5
_COLUMNS = 64


@starting_points.register("gptq")
class Gptq(StartingPoint):
    """Weights of the 4-bit layers that plain rounding gives GPTQ's codes for, on the scales that there are."""

    needs_text = True
    replaces_weights = True

    @torch.no_grad()
    def apply(self, start: Start) -> None:
        """As StartingPoint; the 8-bit layers count as they ship.

        Raises:
            UnsupportedModelError: the model has no list of blocks, or inputs that are not finite.
        """
        architecture = Architecture(start.network)
        for layer in start.layers:
            view = architecture.matrix(layer.name)
            view.parameter.data = view.parameter.data.float().clone()  # the model's own are read again afterwards
            if layer.name in start.replaced_weights:
                view.write(start.replaced_weights[layer.name])
            if layer.encoding and layer.encoding.bits == 8:
                start.quantizers[layer.name].dequantize_into(view.read().clone(), view.read())
        tuned = [layer for layer in start.layers if layer.encoding and layer.encoding.bits == 4]
        start.replaced_weights |= gptq(start.network.float(), tuned, start.quantizers, start.calibration)


@torch.no_grad()
def gptq(
    network: PreTrainedModel,
    layers: Sequence[LayerFormat],
    quantizers: Mapping[str, TunableQuantizer],
    calibration: Tensor,
) -> dict[str, Tensor]:
    """Weights that round to GPTQ's codes, by layer, (output, input) float32; the quantizers' scales stay.

    Args:
        network: float32; its weights are the de-quantized ones afterwards.
        layers: those to do; the ones outside the decoder's blocks are left as they are.
        calibration: tokens, (sequences, length).

    Raises:
        UnsupportedModelError: the model has no list of blocks, or inputs that are not finite.
    """
    architecture = Architecture(network)
    replaced_weights: dict[str, Tensor] = {}
    for block in architecture.walk_blocks(calibration):
        for names in block.layers_by_input(layer.name for layer in layers if block.holds(layer.name)):
            moments = _second_moments(block.inputs_of(names[0]))
            for name in names:
                weight = architecture.matrix(name).read()
                replaced_weights[name] = rounding_to_gptq(weight, moments, quantizers[name], name)
                quantizers[name].dequantize_into(replaced_weights[name], weight)
    return replaced_weights


def rounding_to_gptq(weight: Tensor, inputs: Tensor, quantizer: TunableQuantizer, name: str) -> Tensor:
    """The weight whose plain rounding is GPTQ's, (output, input) float32.

    Args:
        weight: (output, input).
        inputs: second moments of the layer's inputs, (input, input) float32.
        name: for the error.

    Raises:
        UnsupportedModelError: the second moments are not finite.
    """
    order = inputs.diagonal().argsort(descending=True)
    factor = _inverse_factor(inputs[order][:, order], name)
    step, zero_point = (value[:, order // quantizer.layer.group_size, 0] for value in quantizer.grid())
    remaining = weight.float()[:, order]
    kept = torch.empty_like(remaining)
    for begin in range(0, len(order), _COLUMNS):
        here = slice(begin, min(begin + _COLUMNS, len(order)))
        block, errors = remaining[:, here].clone(), torch.empty_like(remaining[:, here])
        own = factor[here, here]
        for column in range(block.shape[1]):
            value, scale, zero = block[:, column].clone(), step[:, begin + column], zero_point[:, begin + column]
            code = (torch.round(value / scale) + zero).clamp_(quantizer.level_low, quantizer.level_high)
            rounded = (code - zero) * scale
            kept[:, begin + column] = rounded + _SHARE_KEPT * (value - rounded)
            errors[:, column] = (value - rounded) / own[column, column]
            block[:, column:] -= torch.outer(errors[:, column], own[column, column:])
        remaining[:, here.stop :] -= errors @ factor[here, here.stop :]
    result = torch.empty_like(kept)
    result[:, order] = kept
    return result


def _inverse_factor(moments: Tensor, name: str) -> Tensor:
    """Upper Cholesky factor of the inverse; the diagonal is raised until there is one."""
    identity = torch.eye(len(moments), device=moments.device)
    energy = moments.diagonal().mean()
    if not torch.isfinite(moments).all():
        raise UnsupportedModelError(
            f"{name}: its inputs are not finite on the calibration text; set compress.gptq = false"
        )
    damping = _DAMPING
    while damping <= 1:
        lower, failed = torch.linalg.cholesky_ex(moments + (damping * energy + 1e-12) * identity)
        if not failed:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
    raise UnsupportedModelError(f"{name}: its inputs hardly vary on the calibration text; set compress.gptq = false")


def _second_moments(inputs: Iterable[Tensor]) -> Tensor:
    """Mean of x·xᵀ over what a layer reads, (input, input) float32.

    Args:
        inputs: a batch each, (…, input).
    """
    moments: Tensor | None = None
    count = 0
    for batch in inputs:
        rows = batch.reshape(-1, batch.shape[-1]).float()
        count += len(rows)
        moments = rows.T @ rows if moments is None else moments.addmm_(rows.T, rows)
    assert moments is not None
    return moments / count
