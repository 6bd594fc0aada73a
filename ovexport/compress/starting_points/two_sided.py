"""Rounding that weighs errors by what a layer reads and by what its outputs do to the model's predictions.

The moments are of the uncompressed model, block by block from the last to the first, then of the embedding and the
head, which are rounded with the same care. What is left are the values of the codes themselves: tuning begins from
them, where half a step moves any code.
"""

import logging

import torch

from ovexport.compress.moments import moments_by_block
from ovexport.compress.starting_points.starting_point import Start, StartingPoint, starting_points
from ovexport.compress.successive import Curvature, Grid, refined
from ovexport.models.architecture import Architecture
from ovexport.models.device import Compute

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
        rounded = [name for name in start.quantizers if name not in start.own_grids]
        if not rounded:
            return
        network = start.network
        for name in start.replaced_weights:
            view = Architecture(network).matrix(name)
            view.parameter.data = view.parameter.data.float().clone()
            view.write(start.replaced_weights[name])
        device = Compute.of(start.spec.device, "fp32").device
        network = network.float().to(device)
        for moments in moments_by_block(network, rounded, start.calibration.to(device), start.generator):
            for name, found in moments.items():
                quantizer = start.quantizers[name].to(device)
                weight = start.weight(name).to(device).float()
                values, grid = refined(weight, Grid.of(quantizer), Curvature.of(found, name))
                if quantizer.symmetric:
                    quantizer.set_scale(-quantizer.level_low * grid.step)
                else:
                    quantizer.set_grid(grid.step, -grid.zero_point * grid.step)
                quantizer.cpu()
                start.replaced_weights[name] = values.cpu()
            logger.info("  rounded: %d of %d layers", len(start.replaced_weights), len(rounded))
