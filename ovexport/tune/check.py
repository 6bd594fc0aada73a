"""What would stop the stage, found before any work: a device that is not there, an unknown objective."""

from collections.abc import Iterator

from ovexport.checking import Finding, raised
from ovexport.models.device import require_device
from ovexport.objectives import objectives
from ovexport.objectives.objective import OPTION
from ovexport.recipe import TuneSpec


def check(spec: TuneSpec) -> Iterator[Finding]:
    """Every problem of the stage."""
    yield from raised(require_device, spec.device)
    yield from raised(objectives.load, spec.objective, OPTION)
