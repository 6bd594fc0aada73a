"""The proof's table: a row per weight matrix, with the checks that are about it."""

from collections import defaultdict
from dataclasses import dataclass

from ovexport.reports import Check, LayerRow, VerificationReport


@dataclass(frozen=True, slots=True)
class LayerProof:
    """A weight matrix and how many of its checks passed.

    Attributes:
        failed: the names of those that did not.
    """

    layer: LayerRow
    passed: int
    failed: tuple[str, ...]


def proof_rows(report: VerificationReport) -> tuple[LayerProof, ...]:
    """Each weight matrix with its checks; a check's subject begins with the name of the matrix it is about."""
    checks: dict[str, list[Check]] = defaultdict(list)
    for check in report.checks:
        checks[check.subject.split(" ")[0]].append(check)
    return tuple(
        LayerProof(
            layer=layer,
            passed=sum(check.passed for check in checks[layer.name]),
            failed=tuple(check.name for check in checks[layer.name] if not check.passed),
        )
        for layer in report.layers
    )
