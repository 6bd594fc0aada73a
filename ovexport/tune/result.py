"""The checkpoint of the best step."""

import math
from collections.abc import Sequence
from pathlib import Path

from ovexport.artifacts import DRAWN_RANKS, Checkpoint, DrawnRanks, DrawnStep, PreparedData, Validation
from ovexport.models.checkpoint import write_outcome
from ovexport.storage.files import atomic_folder, link_file
from ovexport.storage.records import write_record
from ovexport.storage.tensorfile import write_tensors
from ovexport.tune.sampler import Sampler
from ovexport.tune.store import StateStore
from ovexport.tune.trainer import Trainer


def write_tuned(
    trainer: Trainer, store: StateStore, losses: Sequence[tuple[int, float]], data: PreparedData, out: Path
) -> Checkpoint:
    """The best parameters, with the median ranks if they are elastic.

    Args:
        losses: steps, from 0, each with its training loss; a search of ranks reads them.
    """
    student, best = trainer.student, store.best()
    ranks = trainer.space.by_layer(trainer.space.median)
    student.load_parameters(best)
    student.use_ranks(ranks)
    manifest = trainer.start.manifest.with_values(
        steps=store.state.best_step,
        validation=_validation(trainer.objective.figure, store.state.best_value),
        norms=trainer.norms,
    )
    with atomic_folder(out) as folder:
        write_tensors(best, folder / "adapters.safetensors")
        if manifest.replaced_weights:
            link_file(trainer.start.path / "weights.safetensors", folder / "weights.safetensors")
        if trainer.space.is_choice and trainer.steps:
            write_record(_drawn(trainer.sampler, losses), folder / DRAWN_RANKS)
        write_outcome(folder, manifest, student, ranks, data.tokens("test"))
    return Checkpoint(out)


def _validation(figure: str, value: float) -> Validation | None:
    return Validation(figure=figure, value=value) if math.isfinite(value) else None


def _drawn(sampler: Sampler, losses: Sequence[tuple[int, float]]) -> DrawnRanks:
    steps = [DrawnStep(step=step, ranks=sampler.ranks(step), loss_nats=loss) for step, loss in losses]
    return DrawnRanks(steps=tuple(steps))
