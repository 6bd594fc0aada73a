"""The cheapest choice of one option each within a limit of bytes, exactly.

Layer by layer, all sums of bytes that the choices so far can have are kept with their least cost, without those that
another one beats in both. There are no more of them than there are different sums, and layers come in few shapes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Option:
    """One of the formats that a layer can have.

    Attributes:
        size_bytes: of the layer in it.
        cost: not negative; less is better.
    """

    size_bytes: int
    cost: float


@dataclass(frozen=True, slots=True)
class Frontier:
    """The best choices: each costs less than every smaller one.

    Attributes:
        sizes_bytes: of all layers together, ascending, (choices,).
        costs: descending, (choices,).
    """

    sizes_bytes: NDArray[np.int64]
    costs: NDArray[np.float64]
    _steps: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]

    def within(self, limit_bytes: int) -> tuple[int, ...]:
        """The option of each layer in the cheapest choice within a limit.

        Raises:
            ValueError: even the smallest choice is larger.
        """
        at = int(np.searchsorted(self.sizes_bytes, limit_bytes, side="right")) - 1
        if at < 0:
            raise ValueError(f"the smallest choice takes {self.sizes_bytes[0]} bytes")
        chosen: list[int] = []
        for parents, options in reversed(self._steps):
            chosen.append(int(options[at]))
            at = int(parents[at])
        return tuple(reversed(chosen))


def frontier(layers: Sequence[Sequence[Option]]) -> Frontier:
    """The best choices of one option for each layer; without layers there is one, which is empty."""
    sizes, costs = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for options in layers:
        all_sizes = np.concatenate([sizes + option.size_bytes for option in options])
        all_costs = np.concatenate([costs + option.cost for option in options])
        order = np.lexsort((all_costs, all_sizes))
        least = np.minimum.accumulate(all_costs[order])
        better = np.concatenate([[True], all_costs[order][1:] < least[:-1]])
        kept = order[better]
        steps.append((kept % len(sizes), kept // len(sizes)))
        sizes, costs = all_sizes[kept], all_costs[kept]
    return Frontier(sizes, costs, tuple(steps))
