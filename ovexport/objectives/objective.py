"""What an objective is, and how one is made by its name in a recipe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.artifacts import PreparedData
from ovexport.models.device import Compute
from ovexport.models.head import Head
from ovexport.models.uncompressed import UncompressedModel
from ovexport.progress import Listener
from ovexport.recipe import ModelSpec, TuneSpec
from ovexport.registry import Registered, Registry


class Objective(Protocol):
    """What a model is tuned for.

    The network runs inside `with compute.autocast()`, with the `compute` of the Material; `head` makes logits of its
    hidden states, a few tokens at a time (see ovexport.objectives.loss). A class is registered by a name that recipes
    use, and is an ObjectiveType too:

        @objectives.register("next_token")            # or an entry point in the group "ovexport.objectives"
        class NextToken:
            figure = "validation_next_token_nats"

            @classmethod
            def train_examples(cls, data): ...        # how many there are
            @classmethod
            def build(cls, material): ...             # one of these, with its texts and what it needs of the base model

    tests/test_objectives.py has the whole of it. Equal inputs have to give equal results to the last bit.

    Attributes:
        figure: what the validation measures, from "validation_" to its unit, such as "validation_kl_nats"; less is
            better.
        validation_examples: how many there are.
    """

    figure: str
    validation_examples: int

    def tokens(self, indices: Sequence[int]) -> int:
        """How many tokens of these training examples are read."""

    def weight(self, indices: Sequence[int]) -> int:
        """How many tokens of these training examples have a loss."""

    def loss(self, network: PreTrainedModel, head: Head, indices: Sequence[int], weight: int) -> Tensor:
        """The loss of a microbatch of training examples, differentiable: summed over its tokens and divided by
        `weight`, that of the whole step."""

    def score(self, network: PreTrainedModel, head: Head, indices: Sequence[int]) -> float:
        """The figure of some validation examples: the mean over their tokens, with logits in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What an objective is made of.

    Attributes:
        base: the uncompressed model; its network is the student's afterwards, so what is needed of it has to be
            computed while the objective is made.
        train: indices of the training examples that will be read, ascending; what the objective is asked for are places
            in these. Empty if it only validates.
    """

    base: UncompressedModel
    compute: Compute
    spec: TuneSpec
    model: ModelSpec
    data: PreparedData
    train: NDArray[np.int64]
    listener: Listener


class ObjectiveType(Protocol):
    """What makes an objective; usually its class."""

    def train_examples(self, data: PreparedData) -> int:
        """How many training examples there are."""

    def build(self, material: Material) -> Objective:
        """The objective of a tuning."""


objectives: Registry[ObjectiveType] = Registry("ovexport.objectives", "objective")
"""By the name in `tune.objective`."""
OPTION = "tune.objective"
"""Where a recipe names one."""


def count_train_examples(name: str, data: PreparedData) -> int:
    """How many training examples an objective has.

    Raises:
        RecipeError, PlugInError: it is unknown, or the plug-in with it fails.
    """
    registered = objectives.load(name, OPTION)
    with registered.guarded():
        return registered.thing.train_examples(data)


def build_objective(material: Material) -> Objective:
    """The objective that a recipe names.

    Raises:
        RecipeError, PlugInError: it is unknown, or the plug-in with it fails.
    """
    registered = objectives.load(material.spec.objective, OPTION)
    with registered.guarded():
        objective = registered.thing.build(material)
        return objective if registered.provider is None else _PlugIn(objective, registered)


class _PlugIn:
    """A plug-in's objective; what it raises is one line that names it."""

    def __init__(self, objective: Objective, registered: Registered[ObjectiveType]) -> None:
        if not objective.figure.startswith("validation_"):
            raise registered.failure(f"its figure is named {objective.figure!r}, and has to begin with 'validation_'")
        self._objective = objective
        self._guarded = registered.guarded
        self.figure = objective.figure
        self.validation_examples = objective.validation_examples

    def tokens(self, indices: Sequence[int]) -> int:
        """As Objective."""
        with self._guarded():
            return self._objective.tokens(indices)

    def weight(self, indices: Sequence[int]) -> int:
        """As Objective."""
        with self._guarded():
            return self._objective.weight(indices)

    def loss(self, network: PreTrainedModel, head: Head, indices: Sequence[int], weight: int) -> Tensor:
        """As Objective."""
        with self._guarded():
            return self._objective.loss(network, head, indices, weight)

    def score(self, network: PreTrainedModel, head: Head, indices: Sequence[int]) -> float:
        """As Objective."""
        with self._guarded():
            return self._objective.score(network, head, indices)
