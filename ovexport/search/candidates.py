"""The configurations that are tried: heuristics first, then children of the best so far."""

from collections.abc import Iterator, Sequence

import numpy as np

from ovexport.artifacts import DrawnStep
from ovexport.recipe import SearchSpec
from ovexport.search.scores import Scores
from ovexport.weights.ranks import Configuration, RankSpace

_LEAST_LOSSES = 5
_PARENTS = 8
_CROSSED_SHARE = 0.5
_MUTATED_UNITS = 2.0
_MOST_DRAWS = 1000


def heuristics(space: RankSpace, drawn: Sequence[DrawnStep]) -> Iterator[tuple[str, Configuration]]:
    """Those of the NLS example, with the largest and the smallest ranks; each with where it comes from.

    Args:
        drawn: what the tuning steps drew.
    """
    yield "median", space.median
    if drawn:
        yield "most frequent", space.most_frequent([step.ranks for step in drawn])
    for index in np.argsort([step.loss_nats for step in drawn], kind="stable")[:_LEAST_LOSSES]:
        yield "least loss", drawn[index].ranks
    for name, rank in (("largest", max(space.ranks)), ("smallest", min(space.ranks))):
        yield name, (rank,) * len(space.units)


def children(space: RankSpace, scores: Scores, spec: SearchSpec) -> Iterator[Configuration]:
    """New configurations from the best so far, until as many are scored as were asked for or none is left."""
    generator = np.random.default_rng(spec.seed)
    possible = len(space.ranks) ** len(space.units)
    while len(scores.rows) < min(spec.evaluations, possible):
        for _ in range(_MOST_DRAWS):
            child = _child(space, [row.ranks for row in scores.rows[:_PARENTS]], generator)
            if not scores.has(child):
                break
        else:
            return
        yield child


def _child(space: RankSpace, parents: Sequence[Configuration], generator: np.random.Generator) -> Configuration:
    """A parent, or a mixture of two, with a few units mutated."""
    first, second = (np.array(parents[index]) for index in generator.integers(0, len(parents), 2))
    crossed = generator.random() < _CROSSED_SHARE
    mixed = np.where(generator.random(len(first)) < 0.5, first, second) if crossed else first
    mutated = generator.random(len(mixed)) < min(1.0, _MUTATED_UNITS / len(mixed))
    drawn = generator.choice(space.ranks, len(mixed))
    return tuple(int(rank) for rank in np.where(mutated, drawn, mixed))
