"""What an interrupted tuning goes on from: state.json, and the tensors beside it."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from ovexport.models.student import Student
from ovexport.storage.records import Record
from ovexport.tune.optimizer import MovingAverages, Optimizer


class TuningState(Record):
    """state.json.

    What is drawn at random is the order of the examples and, for elastic adapters, their ranks; both follow from the
    recipe's seed and the step, and so do the learning rates.

    Attributes:
        identity: digest of all that this tuning depends on; one with another digest does not go on from this state.
        learning_rate: of the adapters, which a probe may have chosen.
        step: optimizer steps begun, the skipped ones too.
        updates: steps that changed the parameters.
        skipped: consecutive steps, up to this one, with a non-finite loss or gradient.
        best_step, best_value: of the best parameters, by validation.
        stale: validations since the best one.
    """

    identity: str
    learning_rate: float | None = None
    step: int = 0
    updates: int = 0
    skipped: int = 0
    best_step: int = 0
    best_value: float = math.inf
    stale: int = 0


def state_tensors(student: Student, optimizer: Optimizer, averages: MovingAverages) -> dict[str, NDArray[np.generic]]:
    """Parameters, the optimizer's moments and the averages, by name."""
    tensors = {key: value.detach() for key, value in student.trained.items()} | optimizer.moments()
    tensors |= {f"average/{key}": value for key, value in averages.values.items()}
    return {key: value.cpu().numpy().copy() for key, value in tensors.items()}


@torch.no_grad()
def restore_tensors(
    tensors: Mapping[str, NDArray[np.generic]],
    updates: int,
    student: Student,
    optimizer: Optimizer,
    averages: MovingAverages,
) -> None:
    """Go on from what `state_tensors` gave after so many updates.

    Raises:
        KeyError: a tensor is missing; nothing was changed.
    """
    moments = optimizer.moment_names(updates)
    wanted = [*student.trained, *(f"average/{key}" for key in averages.values), *moments]
    values = {key: torch.from_numpy(np.array(tensors[key])).to(student.device) for key in wanted}
    student.assign({key: values[key] for key in student.trained})
    averages.restore({key: values[f"average/{key}"] for key in averages.values})
    optimizer.restore({key: values[key] for key in moments}, updates)
