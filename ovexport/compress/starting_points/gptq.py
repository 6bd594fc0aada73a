"""GPTQ's rounding as a starting point: one input channel after the other, the error spread over those to come.

Frantar et al., arXiv:2210.17323, as `successive` has it for one side: columns with the most energetic inputs come
first, on scales and zero points that are settled before ("act-order" with static groups). Blocks of the decoder are
done in their order, each on what the rounded ones before it give.

The weights that tuning adds its adapters to lie half way between what an entry was rounded from and the value of its
code: which codes flip at little cost shows, and yet not many flip with the first small change.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.compress.moments import Moments, add_products, mirrored
from ovexport.compress.starting_points.starting_point import Start, StartingPoint, starting_points
from ovexport.compress.successive import Curvature, Grid, round_successively
from ovexport.models.architecture import Architecture
from ovexport.weights.layer import LayerFormat
from ovexport.weights.quantizer import TunableQuantizer

_SHARE_KEPT = 0.5


@starting_points.register("gptq")
class Gptq(StartingPoint):
    """Weights of the 4-bit layers that plain rounding gives GPTQ's codes for, on the scales that there are."""

    needs_text = True
    replaces_weights = True

    @torch.no_grad()
    def apply(self, start: Start) -> None:
        """As StartingPoint; the 8-bit layers count as they ship, and so do those that the checkpoint holds as codes.

        Raises:
            UnsupportedModelError: the model has no list of blocks, or inputs that are not finite.
        """
        architecture = Architecture(start.network)
        for layer in start.layers:
            view = architecture.matrix(layer.name)
            view.parameter.data = view.parameter.data.float().clone()  # the model's own are read again afterwards
            if layer.name in start.replaced_weights:
                view.write(start.replaced_weights[layer.name])
            if layer.encoding and not _is_rounded(layer, start):
                start.quantizers[layer.name].dequantize_into(view.read().clone(), view.read())
        tuned = [layer for layer in start.layers if _is_rounded(layer, start)]
        start.replaced_weights |= gptq(start.network.float(), tuned, start.quantizers, start.calibration)


def _is_rounded(layer: LayerFormat, start: Start) -> bool:
    return layer.encoding is not None and layer.encoding.bits == 4 and layer.name not in start.own_grids


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
                curvature = Curvature.of(Moments(moments, None), name)
                values = round_successively(weight, Grid.of(quantizers[name]), curvature)
                targets = curvature.inputs.targets(weight, values)
                replaced_weights[name] = values + _SHARE_KEPT * (targets - values)
                weight.copy_(values)
    return replaced_weights


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
        moments = rows.new_zeros(rows.shape[1], rows.shape[1]) if moments is None else moments
        add_products(moments, rows)
    assert moments is not None
    return mirrored(moments) / count
