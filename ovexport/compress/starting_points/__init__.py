"""What tuning starts from: rounding to nearest, and what a recipe asks for on top of it."""

from ovexport.compress.starting_points import gptq, nncf, rounding, two_sided
from ovexport.compress.starting_points.loftq import Loftq
from ovexport.compress.starting_points.nncf_engine import NncfEngine
from ovexport.compress.starting_points.starting_point import Start, StartingPoint, starting_points
from ovexport.recipe import CompressSpec
from ovexport.registry import Registered

__all__ = ["Start", "StartingPoint", "chosen", "gptq", "nncf", "rounding", "starting_points", "two_sided"]

_BY_KEYS = {
    (True, True): "awq_scale_estimation",
    (True, False): "awq",
    (False, True): "scale_estimation",
}
"""The starting point of NNCF's by the keys `awq` and `scale_estimation`."""


def chosen(spec: CompressSpec) -> tuple[Registered[type[StartingPoint]], ...]:
    """The starting points of a recipe, in the order in which they are applied; rounding comes first.

    Raises:
        RecipeError: `starting_point` names none.
        PlugInError: it names a plug-in that can't be imported.
    """
    if spec.engine == "nncf":
        return (Registered(name="nncf engine", thing=NncfEngine),)
    names = ["rounding"]
    if spec.starting_point is not None:
        names.append(spec.starting_point)
    if (by_keys := _BY_KEYS.get((spec.awq, spec.scale_estimation))) is not None:
        names.append(by_keys)
    if spec.rounds:
        names.append(spec.rounding)
    points = tuple(starting_points.load(name, "compress.starting_point") for name in dict.fromkeys(names))
    return (*points, Registered(name="loftq", thing=Loftq)) if spec.init == "loftq" else points
