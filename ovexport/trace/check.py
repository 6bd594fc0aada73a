"""What would stop the stage, found before any work: weights that can't be loaded, a tokenizer that can't be
converted."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ovexport.artifacts import PeftAdapter
from ovexport.checking import Finding, raised
from ovexport.errors import OvexportError
from ovexport.models.adapted import require_fits
from ovexport.models.loading import check_checkpoint, skeleton
from ovexport.openvino.tokenizer import check_tokenizer
from ovexport.recipe import ModelSpec


def check(
    model: ModelSpec, problem: OvexportError | None, texts: Sequence[str] = (), *, templated: bool = False
) -> Iterator[Finding]:
    """Every problem of the stage.

    Args:
        problem: why nothing is known of the model without its weights; None if it is.
        texts: that the IR's tokenizer has to encode as the model's does.
        templated: whether the chat template is used.
    """
    if problem:
        yield problem
    if Path(model.id).is_dir():  # weights on the hub are not downloaded to plan
        yield from raised(check_checkpoint, model)
    if model.adapter is not None and problem is None:
        yield from raised(_check_adapter, model, Path(model.adapter))
    yield from raised(lambda: check_tokenizer(model, texts, templated=templated))


def _check_adapter(model: ModelSpec, folder: Path) -> None:
    """Look whether load_model can add the adapter, by names and shapes."""
    require_fits(PeftAdapter.read(folder), skeleton(model), model.id)
