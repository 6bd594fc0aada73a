"""What a model is tuned for. An objective is a class registered by its name; those of plug-ins are entry points of the
group `ovexport.objectives`."""

from ovexport.objectives.distillation import Distillation
from ovexport.objectives.objective import (
    Material,
    Objective,
    ObjectiveType,
    build_objective,
    count_train_examples,
    objectives,
)
from ovexport.objectives.task import Answers

__all__ = [
    "Answers",
    "Distillation",
    "Material",
    "Objective",
    "ObjectiveType",
    "build_objective",
    "count_train_examples",
    "objectives",
]
