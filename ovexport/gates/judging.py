"""Gates: limits that measured figures have to keep, judged, with a JUnit file for CI systems.

A gate whose limit is inside the figure's 95 % interval is undecided, and so is one on a figure that had too few values
for an interval: it can't be told on which side the figure is. Neither has passed. `.low`, `.high` and `.value` of a
figure have no interval, and are always decided.
"""

import math
import operator
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from xml.etree import ElementTree

from ovexport.artifacts import MODELS
from ovexport.errors import GateFailed, RecipeError
from ovexport.gates.figures import KINDS, PROOF, Figure, figures, figures_of_run
from ovexport.numbers import number, number_with_interval
from ovexport.recipe import Gate, Recipe, list_gates
from ovexport.reports import GateReport, GateResult
from ovexport.storage.files import write_text
from ovexport.versions import stack_versions
from ovexport.wording import printable

_MADE_BY = {"verification": "ovexport verify", "evaluation": "ovexport evaluate", "benchmark": "ovexport bench"}
_COMPARE = {"<": operator.lt, "<=": operator.le, "==": operator.eq, ">=": operator.ge, ">": operator.gt}
_NEAREST = 3


def check_recipe(recipe: Recipe) -> None:
    """Refuse gates on figures that a run does not measure, before it begins.

    Raises:
        RecipeError: with every such gate at once, and the nearest names.
    """
    check(list_gates(recipe.gates), figures_of_run(dict.fromkeys(KINDS), recipe))


def check(gates: Iterable[Gate], known: Mapping[str, Figure]) -> None:
    """Refuse gates on figures that are not known.

    Raises:
        RecipeError: with every such gate at once, and the nearest names.
    """
    unknown = [gate for gate in gates if _look_up(gate.metric, known) is None]
    if unknown:
        raise RecipeError("; ".join(f"gate {gate}: {_nearest(gate.metric, known)}" for gate in unknown))


def judge(gates: Iterable[Gate], known: Mapping[str, Figure]) -> GateReport:
    """Hold figures against their limits.

    Raises:
        RecipeError: a gate is on a figure that is not known.
    """
    gates = tuple(gates)
    check(gates, known)
    results = tuple(_judge_one(gate, _look_up(gate.metric, known)) for gate in gates)
    return GateReport(passed=all(result.passed for result in results), gates=results)


def require_passed(report: GateReport) -> None:
    """Raise when a gate failed or is undecided.

    Raises:
        GateFailed: naming every gate that has not passed.
    """
    told = []
    for status in ("failed", "undecided"):
        results = [result for result in report.gates if result.status == status]
        if results:
            gates = "; ".join(describe(result) for result in results)
            told.append(f"{len(results)} of {len(report.gates)} gates {status}: {gates}")
    if told:
        raise GateFailed("; ".join(told), report)


def describe(result: GateResult) -> str:
    """One gate with its value, interval, limit and margin in a line."""
    if result.undecided:
        return f"{result.gate}: undecided, {result.reason}"
    if result.value is None or result.margin is None:
        return f"{result.gate}: {result.reason}"
    value, limit, margin = number_with_interval(result.value, result.ci95), number(result.limit), number(result.margin)
    return f"{result.metric} is {value}, limit {result.operator} {limit}, margin {margin}"


def write_junit(report: GateReport, command: str, path: Path) -> None:
    """Write the gates as JUnit XML, a test case each, which CI systems show.

    Args:
        command: that judged them: the test cases' class.

    Raises:
        ArtifactError: the file can't be written.
    """
    failures = sum(not result.passed for result in report.gates)
    counts = {"tests": str(len(report.gates)), "failures": str(failures), "errors": "0", "skipped": "0", "time": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "ovexport"} | counts)
    properties = ElementTree.SubElement(suite, "properties")
    for name, version in stack_versions().items():
        ElementTree.SubElement(properties, "property", name=name, value=version)
    for result in report.gates:
        case = ElementTree.SubElement(suite, "testcase", classname=f"ovexport.{command}", name=result.gate, time="0")
        if result.passed:
            ElementTree.SubElement(case, "system-out").text = describe(result)
        else:
            failure_type = "GateUndecided" if result.undecided else "GateFailed"
            failure = ElementTree.SubElement(case, "failure", message=describe(result), type=failure_type)
            failure.text = describe(result)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True).decode()
    write_text("".join(f"{printable(line)}\n" for line in text.split("\n")), path)  # XML has no control characters


def _judge_one(gate: Gate, figure: Figure | None) -> GateResult:
    figure = figure or Figure(None)
    value, reason, undecided = figure.value, None, False
    if value is None:
        reason = f"not measured: {figure.reason}" if figure.reason else "not measured"
    elif not math.isfinite(value):
        value, reason = None, f"measured as {value}, which keeps no limit"
    elif _may_be_either(gate, value, figure):
        undecided, reason = True, _too_few(gate, figure)
    return GateResult(
        gate=str(gate),
        metric=gate.metric,
        operator=gate.operator,
        limit=gate.limit,
        value=value,
        ci95=None if value is None else figure.ci95,
        margin=None if value is None else _margin(gate, value),
        passed=value is not None and not undecided and _COMPARE[gate.operator](value, gate.limit),
        undecided=undecided,
        reason=reason,
    )


def _too_few(gate: Gate, figure: Figure) -> str:
    """Why a gate is undecided: "24 prompts are too few: 0.89 (0.84–0.94) holds the limit 0.9"."""
    assert figure.value is not None
    if figure.ci95 is None:
        return f"{figure.over} are too few for an interval"
    measured = number_with_interval(figure.value, figure.ci95)
    return f"{figure.over or 'the values'} are too few: {measured} holds the limit {number(gate.limit)}"


def _may_be_either(gate: Gate, value: float, figure: Figure) -> bool:
    """Whether the figure may be on either side of the limit: its interval holds it, or there was too little for one."""
    if figure.ci95 is None:
        return figure.over is not None
    low, high = figure.ci95
    if gate.operator == "==":
        return low <= gate.limit <= high and low < high
    return len({_COMPARE[gate.operator](one, gate.limit) for one in (low, value, high)}) > 1


def _margin(gate: Gate, value: float) -> float:
    if gate.operator == "==":
        return 0.0 - abs(value - gate.limit)
    return value - gate.limit if gate.operator in (">", ">=") else gate.limit - value


def _look_up(metric: str, known: Mapping[str, Figure]) -> Figure | None:
    if metric in known:
        return known[metric]
    return next((known[name] for name in known if name.endswith(".") and metric.startswith(name)), None)


def _nearest(metric: str, known: Mapping[str, Figure]) -> str:
    """What to say of a figure that is not known."""
    names = [name for name in known if not name.endswith(".")]
    near = get_close_matches(metric, names, _NEAREST)
    near = near or sorted((name for name in names if metric in name), key=len)[:_NEAREST]
    for report_name, command in _MADE_BY.items():
        others = _bare_names(figures({report_name: None}, models=MODELS)) - _bare_names(known)
        if any(metric == name or metric.endswith(f".{name}") for name in others):
            return f"{metric} is not measured here; {command} does it, and a run"
    cure = f"the nearest are {', '.join(near)}" if near else "ovexport gates lists the names"
    return f"no figure is named {metric}; {cure}"


def _bare_names(known: Iterable[str]) -> set[str]:
    """The names, and those of models and of pairs of them without the models."""
    qualified = {name.partition(".")[2] for name in known if not name.startswith(PROOF)}
    return {*known, *qualified} - {""}
