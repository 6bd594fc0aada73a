"""The two shapes that nearly every check has, and what they are about."""

from typing import Any

from ovexport.openvino.graph import Weight
from ovexport.reports import Check


def zero(name: str, subject: str, value: int, detail: str = "") -> Check:
    """Passes when the count is 0; the detail is for a failure."""
    return Check(name=name, subject=subject, value=value, limit=0, passed=value == 0, detail=detail if value else "")


def equal(name: str, subject: str, value: Any, limit: Any, detail: str = "") -> Check:
    """Passes when the value is the limit; the detail is for a failure."""
    same = value == limit
    return Check(name=name, subject=subject, value=value, limit=limit, passed=same, detail="" if same else detail)


def readings(graph_weights: tuple[Weight, ...]) -> dict[str, list[tuple[str, Weight]]]:
    """By name of its codes, each way in which a weight is read, with what a check on it is called: the name alone where
    there is one way."""
    by_name: dict[str, list[Weight]] = {}
    for weight in graph_weights:
        by_name.setdefault(weight.name, []).append(weight)
    return {
        name: [(f"{name} as read by {one.consumer_names[0]}" if len(ways) > 1 else name, one) for one in ways]
        for name, ways in by_name.items()
    }
