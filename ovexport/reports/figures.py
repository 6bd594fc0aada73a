"""Estimates and their intervals, and what a figure means."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict

from ovexport.storage.records import Record

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a figure says, and which way is better; None where neither is."""

    text: str
    better: Literal["lower", "higher"] | None = None


class Figures(Record):
    """Measured numbers: none of them is infinite or not a number."""

    model_config = ConfigDict(allow_inf_nan=False)


class Estimate(Figures):
    """A figure with its 95 % interval; None where there were too few values for one."""

    value: float
    ci95: Interval | None


class Samples(Figures):
    """A latency in milliseconds: order statistics and what they were taken from."""

    median: float
    p90: Annotated[float, Meaning("90th percentile", "lower")]
    p99: Annotated[float, Meaning("99th percentile", "lower")]
    samples: tuple[float, ...]
