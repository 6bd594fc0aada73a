"""Elastic adapters (FQ_LORA_NLS): which ranks they can have, and configurations of them.

Source: neural low-rank adapter search, Shears (arXiv:2404.10934) and SQFT (arXiv:2410.03750).
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median_high

import numpy as np

from ovexport.errors import RecipeError
from ovexport.weights.layer import LayerFormat

Configuration = tuple[int, ...]
"""A rank for each unit of a space, in its order."""

_BLOCK = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True, slots=True)
class RankSpace:
    """The ranks to choose from, and what has a rank of its own.

    Attributes:
        ranks: largest first.
        units: names of the transformer blocks, or of the Linear layers, in the model's order.
        layers: of each unit, the parameters whose adapters have its rank.
    """

    ranks: tuple[int, ...]
    units: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, layers: Iterable[LayerFormat], ranks: Iterable[int], by: str) -> "RankSpace":
        """The space of these layers; one without choice where there is no rank, or one.

        Args:
            by: what has a rank of its own, "block" or "linear".
        """
        units: dict[str, list[str]] = {}
        for layer in layers:
            if layer.rank:
                units.setdefault(_unit(layer, by), []).append(layer.name)
        ordered = tuple(sorted(set(ranks), reverse=True))
        return cls(ordered, tuple(units), tuple(map(tuple, units.values())))

    @property
    def is_choice(self) -> bool:
        """Whether there is more than one configuration."""
        return len(self.ranks) > 1 and bool(self.units)

    @property
    def median(self) -> Configuration:
        """The median rank everywhere: the configuration that stands for the space; empty for one without ranks."""
        return (median_high(self.ranks),) * len(self.units) if self.ranks else ()

    def draw(self, *seeds: int) -> Configuration:
        """A random configuration, which follows from the seeds alone."""
        return tuple(int(rank) for rank in np.random.default_rng(seeds).choice(self.ranks, len(self.units)))

    def most_frequent(self, drawn: Sequence[Configuration]) -> Configuration:
        """Of each unit the rank that it had most often; the larger one of two alike."""
        columns = zip(*drawn, strict=True)
        return tuple(max(Counter(column).items(), key=lambda item: item[::-1])[0] for column in columns)

    def by_layer(self, configuration: Configuration) -> dict[str, int]:
        """The rank of each layer; empty for a space without ranks."""
        if not self.ranks:
            return {}
        return {name: rank for names, rank in zip(self.layers, configuration, strict=True) for name in names}

    def chosen(self, ranks: Sequence[int], option: str) -> Configuration:
        """The configuration that a user gives.

        Args:
            ranks: one for all units, or one for each.
            option: what the user wrote them in, for messages.

        Raises:
            RecipeError: their number does not fit, or one is above the largest; those between two of the space are as
                good as any, since adapters are sliced.
        """
        if not self.ranks:
            raise RecipeError(f"{option}: the adapters have one rank; it goes with compress.rank_space")
        if len(ranks) not in (1, len(self.units)):
            raise RecipeError(
                f"{option}: {len(ranks)} ranks, and there are {len(self.units)} units, from {self.units[0]} to "
                f"{self.units[-1]}; give one rank for all, or one for each"
            )
        for rank in ranks:
            if not 1 <= rank <= max(self.ranks):
                raise RecipeError(f"{option}: {rank} is out of range, the adapters have ranks 1 to {max(self.ranks)}")
        return tuple(ranks) if len(ranks) > 1 else tuple(ranks) * len(self.units)


def _unit(layer: LayerFormat, by: str) -> str:
    if by == "block" and (block := _BLOCK.match(layer.name)):
        return block[1]
    return layer.name.removesuffix(".weight")
