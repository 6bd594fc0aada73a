"""Rounding that weighs errors by what a layer reads and by what its outputs do to the model's predictions.

The moments are of the uncompressed model, block by block from the last to the first, then of the embedding and the
head, which are rounded with the same care. What is left are the values of the codes themselves: tuning begins from
them, where half a step moves any code.
"""

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ovexport.compress.moments import moments_by_block
from ovexport.compress.roundings import Roundings
from ovexport.compress.starting_points.starting_point import Start, StartingPoint, starting_points
from ovexport.compress.successive import Curvature, Grid, refined
from ovexport.models.architecture import Architecture
from ovexport.models.device import Compute
from ovexport.weights.layer import LayerFormat

logger = logging.getLogger(__name__)


@starting_points.register("two_sided")
class TwoSided(StartingPoint):
    """Values of codes that were rounded with both sides' second moments, and steps fitted to them.

    Layers outside the decoder's blocks stay as they are, but for embeddings and the head; so do layers that the model's
    checkpoint holds as codes.
    """

    needs_text = True
    replaces_weights = True

    @torch.no_grad()
    def apply(self, start: Start) -> None:
        """As StartingPoint.

        Raises:
            UnsupportedModelError: the model has no list of blocks, or moments that are not finite.
        """
        layers = [layer for layer in start.layers if layer.encoding and layer.name not in start.own_grids]
        known = start.roundings if not start.replaced_weights else None
        for layer, values, grid in _rounded(start, layers) if known is None else _kept(known, start, layers):
            quantizer = start.quantizers[layer.name]
            if quantizer.symmetric:
                quantizer.set_scale(-quantizer.level_low * grid.step)
            else:
                quantizer.set_grid(grid.step, -grid.zero_point * grid.step)
            start.replaced_weights[layer.name] = values.cpu()


def _rounded(start: Start, layers: Sequence[LayerFormat]) -> Iterator[tuple[LayerFormat, Tensor, Grid]]:
    """Layers with the values that they are rounded to, and their grids."""
    if not layers:
        return
    network = start.network
    for name in start.replaced_weights:
        view = Architecture(network).matrix(name)
        view.parameter.data = view.parameter.data.float().clone()
        view.write(start.replaced_weights[name])
    device = Compute.of(start.spec.device, "fp32").device
    network = network.float().to(device)
    by_name = {layer.name: layer for layer in layers}
    generator = torch.Generator().manual_seed(start.generator.initial_seed())  # as a budget begins, too
    done = 0
    for moments in moments_by_block(network, list(by_name), start.calibration.to(device), generator):
        for name, found in moments.items():
            grid = Grid.of(start.quantizers[name]).to(device)
            yield by_name[name], *refined(start.weight(name).to(device).float(), grid, Curvature.of(found, name))
        done += len(moments)
        logger.info("  rounded: %d of %d layers", done, len(layers))


def _kept(
    roundings: Roundings, start: Start, layers: Sequence[LayerFormat]
) -> Iterator[tuple[LayerFormat, Tensor, Grid]]:
    """The same from what was rounded before."""
    for layer in layers:
        found = roundings.take(layer, Grid.of(start.quantizers[layer.name]))
        if found is not None:
            yield layer, *found
