"""What would stop the stage, and what it takes, found before any work."""

from collections.abc import Iterator
from pathlib import Path

from ovexport.checking import Caution, Finding, raised
from ovexport.compress.allocation import known_costs, require_room
from ovexport.compress.starting_points import chosen, starting_points
from ovexport.errors import OvexportError, RecipeError
from ovexport.models.device import require_device
from ovexport.recipe import CompressSpec
from ovexport.weights.plan import LayerPlan
from ovexport.weights.policy import candidate_formats, layer_policies


def check(plan: LayerPlan, spec: CompressSpec, sensitivities: Path | None = None) -> Iterator[Finding]:
    """Every problem of the stage: of the layers, and of the recipe's starting points with them.

    Args:
        plan: the format of each layer.
        sensitivities: file that the stage writes.
    """
    yield from plan.problems
    if spec.budget is not None and not plan.problems:
        yield Caution(
            f"compress.{spec.budget}: the stage compress chooses the formats of Linear layers; the table has the "
            "recipe's own"
        )
        formats = candidate_formats(plan.layers, spec, plan.held_as_codes)
        yield from raised(require_room, formats, plan.layers, spec)
        yield from raised(known_costs, formats, spec)
        yield from raised(_require_another_file, spec, sensitivities)
    yield from raised(require_device, spec.device, "compress.device")
    yield from raised(_check_starting_points, plan, spec)


def _require_another_file(spec: CompressSpec, own: Path | None) -> None:
    if own and spec.sensitivities and Path(spec.sensitivities).resolve() == own.resolve():
        raise RecipeError(
            f"compress.sensitivities={spec.sensitivities!r}: is the file that this run writes; give a copy of it, or "
            "another run's"
        )


def plug_ins(spec: CompressSpec) -> dict[str, str | None]:
    """By key of the recipe, the identity of the plug-in that it names: a digest of what the result depends on."""
    return {
        "starting_point": starting_points.identity(spec.starting_point),
        "layer_policy": layer_policies.identity(spec.layer_policy),
    }


def replaces_weights(spec: CompressSpec) -> bool:
    """Whether a starting point of the recipe may have weights of its own; False where there is none of that name, which
    `check` says."""
    try:
        return any(registered.thing.replaces_weights for registered in chosen(spec))
    except OvexportError:
        return False


def _check_starting_points(plan: LayerPlan, spec: CompressSpec) -> None:
    for registered in chosen(spec):
        with registered.guarded():
            registered.thing().check(plan.layers, spec)
