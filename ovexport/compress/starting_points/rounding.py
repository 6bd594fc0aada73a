"""Rounding to nearest: where every model begins."""

from ovexport.compress.starting_points.starting_point import Start, StartingPoint, starting_points
from ovexport.errors import UnsupportedModelError
from ovexport.weights.quantizer import LARGEST_STEP


@starting_points.register("rounding")
class Rounding(StartingPoint):
    """The smallest grid that holds each group and 0, and adapters whose product is 0.

    A layer that the model's checkpoint holds as codes keeps the grid of these, on which they are what its weights round
    to.
    """

    def apply(self, start: Start) -> None:
        """As StartingPoint.

        Raises:
            UnsupportedModelError: a weight is too large for float16 scales.
        """
        for name, quantizer in start.quantizers.items():
            quantizer.initialize(start.weight(name), start.generator)
            if name in start.own_grids:
                start.own_grids[name].set_on(quantizer)
                continue
            if float(quantizer.grid()[0].abs().max()) >= LARGEST_STEP:
                raise UnsupportedModelError(
                    f"{name}: holds weights up to {float(start.weight(name).abs().max()):.3g}, which float16 scales "
                    "can't reach; give a sound checkpoint, or name the layer in compress.ignored"
                )
