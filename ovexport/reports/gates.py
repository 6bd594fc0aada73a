"""gates.json."""

from typing import Literal

from ovexport.reports.figures import Interval
from ovexport.storage.records import Record


class GateResult(Record):
    """One gate: a metric and its limit.

    Attributes:
        gate: as it was written, such as "similarity>=0.9".
        value: None where it was not measured; `reason` says why.
        ci95: the value's 95 % interval, where it has one.
        margin: how far the value is on the right side of the limit; negative where it fails.
        undecided: whether the limit is inside the interval; `reason` says what there is too little of, and the gate has
            not passed.
    """

    gate: str
    metric: str
    operator: Literal["<", "<=", "==", ">=", ">"]
    limit: float
    value: float | None
    ci95: Interval | None = None
    margin: float | None
    passed: bool
    undecided: bool = False
    reason: str | None = None

    @property
    def status(self) -> Literal["passed", "failed", "undecided"]:
        """The verdict in a word."""
        if self.passed:
            return "passed"
        return "undecided" if self.undecided else "failed"


class GateReport(Record):
    """gates.json.

    Attributes:
        passed: whether every gate did.
    """

    passed: bool
    gates: tuple[GateResult, ...]
