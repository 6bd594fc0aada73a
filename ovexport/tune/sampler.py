"""What each step reads, and with which ranks: both follow from the recipe's seed and the step alone, so a tuning that
was interrupted goes on as it would have."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovexport.recipe import TuneSpec
from ovexport.weights.ranks import Configuration, RankSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """The steps of a tuning.

    Attributes:
        examples: indices of the training examples that are read at all, ascending.
        batches: of each step, (steps, microbatches, batch size), places in `examples`.
        space: the ranks that the adapters can have.
    """

    examples: NDArray[np.int64]
    batches: NDArray[np.int64]
    space: RankSpace
    seed: int

    @classmethod
    def of(cls, spec: TuneSpec, examples: int, space: RankSpace, *, tunable: bool) -> "Sampler":
        """The steps that a recipe asks for.

        Args:
            examples: how many there are to train with.
            tunable: whether there is anything to tune; without it there are no steps.
        """
        steps = count_steps(spec, examples) if tunable else 0
        used, places = np.unique(draw_batches(examples, steps, spec), return_inverse=True)
        batches = places.reshape(steps, spec.gradient_accumulation_steps, spec.batch_size)
        return cls(examples=used, batches=batches, space=space, seed=spec.seed)

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return len(self.batches)

    def microbatches(self, step: int) -> list[list[int]]:
        """The training examples of a step, as places in `examples`."""
        drawn: list[list[int]] = self.batches[step].tolist()
        return drawn

    def ranks(self, step: int) -> Configuration:
        """The ranks of a step, drawn at random."""
        return self.space.draw(self.seed, step)


def count_steps(spec: TuneSpec, examples: int) -> int:
    """How many optimizer steps a recipe asks for with so many training examples."""
    if spec.steps is not None:
        return spec.steps
    return math.ceil((spec.epochs or 1) * examples / (spec.batch_size * spec.gradient_accumulation_steps))


def draw_batches(examples: int, steps: int, spec: TuneSpec) -> NDArray[np.int64]:
    """Which examples each step reads, (steps, microbatches, batch size): every epoch in an order of its own."""
    per_step = spec.batch_size * spec.gradient_accumulation_steps
    epochs = range(-(-steps * per_step // examples))
    orders = [np.random.default_rng((spec.seed, epoch)).permutation(examples) for epoch in epochs]
    drawn = np.concatenate(orders)[: steps * per_step] if orders else np.zeros(0, dtype=np.int64)
    return drawn.reshape(steps, spec.gradient_accumulation_steps, spec.batch_size)
