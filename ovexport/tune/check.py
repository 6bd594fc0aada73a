"""What would stop the stage, found before any work: a device that is not there, an unknown objective, norms that
can't be tuned; and a teacher that is the student already."""

from collections.abc import Iterator

from ovexport.artifacts import IR
from ovexport.checking import Caution, Finding, raised
from ovexport.models.device import require_device
from ovexport.models.loading import skeleton
from ovexport.models.norms import require_norms
from ovexport.objectives import objectives
from ovexport.objectives.objective import OPTION
from ovexport.openvino.norms import require_norm_constants
from ovexport.recipe import ModelSpec, TuneSpec


def check(spec: TuneSpec, model: ModelSpec | None, *, packed: bool = False) -> Iterator[Finding]:
    """Every problem of the stage.

    Args:
        model: None if nothing is known of it, which another stage says.
        packed: the model's own weights are 4-bit codes.
    """
    yield from raised(require_device, spec.device)
    yield from raised(objectives.load, spec.objective, OPTION)
    if spec.norms and model is not None:
        yield from raised(lambda: require_norms(skeleton(model)))
    if packed and spec.objective == "distillation" and spec.steps != 0:
        yield Caution(
            "tune.objective='distillation': the teacher is the 4-bit model itself, so tuning can only make up for what "
            'else the recipe compresses; set tune.objective = "task", or tune.steps = 0'
        )


def require_tunable_norms(spec: TuneSpec, model: ModelSpec, traced: IR) -> None:
    """Refuse norms that the traced graph has no constants of, before anything is tuned; where none are tuned, there is
    nothing to refuse.

    Raises:
        ArtifactError: the IR can't be read.
        UnsupportedModelError: naming the norm.
    """
    if spec.norms:
        require_norm_constants(traced, [norm.name for norm in require_norms(skeleton(model))])
