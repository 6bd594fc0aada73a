"""Means, differences and ratios of means with 95 % intervals, bootstrapped over seeds and items that all rows share.

A handful of seeds says little of what another seed would give: the interval is of these seeds, with what they differ by
in it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovexport.bootstrap import too_few

RESAMPLES = 2000

Samples = NDArray[np.float64]
"""(seeds, items)."""


def resampled(samples: Samples) -> NDArray[np.float64]:
    """Means over seeds and items drawn with replacement; the same items for every row."""
    generator = np.random.default_rng(0)
    seeds, items = samples.shape
    item = generator.integers(0, items, (RESAMPLES, 1, items))
    seed = generator.integers(0, seeds, (RESAMPLES, seeds, 1))
    return np.asarray(samples[seed, item].mean((1, 2)))


def interval(samples: Samples, of: Callable[[Any], Any] = lambda drawn: drawn) -> list[float] | None:
    """The 95 % interval of a function of the mean; None where the items are too few."""
    return _percentiles(of(resampled(samples)), samples.shape[1])


def ratio(ours: Samples, theirs: Samples) -> dict[str, Any]:
    """The mean of ours over the mean of theirs, of the same items."""
    drawn = resampled(ours) / resampled(theirs)
    return {"ratio_of_means": float(ours.mean() / theirs.mean()), "ci95": _percentiles(drawn, ours.shape[1])}


def difference(ours: Samples, theirs: Samples) -> dict[str, Any]:
    """Ours less theirs, item by item, with the standard error of the same resamples."""
    drawn = resampled(ours) - resampled(theirs)
    return {
        "mean": float(ours.mean() - theirs.mean()),
        "standard_error": float(drawn.std(ddof=1)),
        "ci95": _percentiles(drawn, ours.shape[1]),
    }


def _percentiles(drawn: Any, items: int) -> list[float] | None:
    return None if too_few(items, "items") else np.percentile(drawn, [2.5, 97.5]).tolist()
