"""What would stop the stage, found before any work: a device that is not there, an unknown objective; and a teacher
that is the student already."""

from collections.abc import Iterator

from ovexport.checking import Caution, Finding, raised
from ovexport.models.device import require_device
from ovexport.objectives import objectives
from ovexport.objectives.objective import OPTION
from ovexport.recipe import TuneSpec


def check(spec: TuneSpec, *, packed: bool = False) -> Iterator[Finding]:
    """Every problem of the stage.

    Args:
        packed: the model's own weights are 4-bit codes.
    """
    yield from raised(require_device, spec.device)
    yield from raised(objectives.load, spec.objective, OPTION)
    if packed and spec.objective == "distillation" and spec.steps != 0:
        yield Caution(
            "tune.objective='distillation': the teacher is the 4-bit model itself, so tuning can only make up for what "
            'else the recipe compresses; set tune.objective = "task", or tune.steps = 0'
        )
