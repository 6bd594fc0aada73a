"""What would stop the stage, found before any work: layers that can't be compressed as the recipe asks."""

from collections.abc import Iterator

from ovexport.checking import Finding, raised
from ovexport.compress.starting_points.nncf import check_layers
from ovexport.recipe import CompressSpec
from ovexport.weights.policy import LayerPlan


def check(plan: LayerPlan, spec: CompressSpec) -> Iterator[Finding]:
    """Every problem of the stage.

    Args:
        plan: the fate of each layer.
    """
    yield from plan.problems
    yield from raised(check_layers, plan.layers, spec)
