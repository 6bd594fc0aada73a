"""Gates: limits that measured figures have to keep, judged, with a JUnit file for CI systems.

The figures' names are those of the reports' fields. A model's figure stands behind the model's name,
`plain.kl_mean_nats`, and without one it is the product's; behind two models' names stands their ratio,
`int4/bf16.time_per_output_token`, or their difference, `int4-plain.kl_mean_nats`. `.low` and `.high` are the ends of a
figure's 95 % interval, `.p90` and `.p99` order statistics of a latency, whose own name means the median.
"""

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import isclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin
from xml.etree import ElementTree

from ovexport.artifacts import MODELS, Record, RunFolder, read_record, write_text
from ovexport.errors import GateFailed, RecipeError
from ovexport.recipe import Gate, Recipe, list_gates
from ovexport.reports import (
    BenchmarkReport,
    EvaluationReport,
    GateReport,
    GateResult,
    ModelBenchmark,
    ModelEvaluation,
    PointBenchmark,
    VerificationReport,
    VerificationSummary,
)
from ovexport.versions import stack_versions
from ovexport.wording import printable

AnyReport = VerificationReport | EvaluationReport | BenchmarkReport
Keys = Mapping[str, Sequence[str]]

KINDS: dict[str, type[AnyReport]] = {
    "verification": VerificationReport,
    "evaluation": EvaluationReport,
    "benchmark": BenchmarkReport,
}
"""The reports that have figures, by the name of their file."""

_MADE_BY = {"verification": "ovexport verify", "evaluation": "ovexport evaluate", "benchmark": "ovexport bench"}
_COMPARE = {"<": operator.lt, "<=": operator.le, "==": operator.eq, ">=": operator.ge, ">": operator.gt}
_CENTRES = ("value", "median")
_INTERVAL = "ci95"
_NEAREST = 3
_PROOF = "verification."


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure that a gate can be set on; a value of None has a reason."""

    value: float | None
    reason: str | None = None


Named = Iterator[tuple[str, Figure]]


def figures(
    reports: Mapping[str, AnyReport | None],
    *,
    product: str | None = None,
    models: Sequence[str] = (),
    tasks: Sequence[str] = (),
) -> dict[str, Figure]:
    """Every figure of some reports by its name.

    A name that ends with a point stands for all that begin with it: for a part of a report that is not made yet, or
    was not asked for, and whose names are not known.

    Args:
        reports: by a name in KINDS; None for one that is not made yet, or is missing.
        product: the model that is meant where a name has none; the last one unless given.
        models: that the reports are to hold, in their order; those they do hold need not be named.
        tasks: likewise.
    """
    held = [name for report in reports.values() for name in getattr(report, "models", ())]
    names = tuple(dict.fromkeys((*models, *held)))
    pairs = [(later, earlier) for earlier, later in itertools.combinations(names, 2)]
    keys = {
        "models": names,
        "tasks": tasks,
        "ratios": [f"{later}/{earlier}" for later, earlier in pairs],
        "comparisons": [f"{later} - {earlier}" for later, earlier in pairs if earlier != names[0]],
    }
    found = {
        "".join(name.split()): figure
        for kind, report in reports.items()
        for name, figure in _of_report(kind, report, keys)
    }
    return found | _unqualified(found, product or (names[-1] if names else None))


def run_figures(folder: RunFolder, recipe: Recipe) -> dict[str, Figure]:
    """Every figure of a run, those included that it has not measured.

    Raises:
        ArtifactError: a report is corrupt.
    """
    paths = {kind: folder.path / f"{kind}.json" for kind in KINDS}
    reports = {kind: read_record(path, KINDS[kind]) if path.is_file() else None for kind, path in paths.items()}
    return _figures_of_run(reports, recipe)


def check_recipe(recipe: Recipe) -> None:
    """Refuse gates on figures that a run does not measure, before it begins.

    Raises:
        RecipeError: with every such gate at once, and the nearest names.
    """
    check(list_gates(recipe.gates), _figures_of_run(dict.fromkeys(KINDS), recipe))


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
    """Raise when a gate failed.

    Raises:
        GateFailed: naming every gate that failed.
    """
    failed = [result for result in report.gates if not result.passed]
    if failed:
        gates = "; ".join(describe(result) for result in failed)
        raise GateFailed(f"{len(failed)} of {len(report.gates)} gates failed: {gates}", report)


def describe(result: GateResult) -> str:
    """One gate with its value, limit and margin in a line."""
    if result.value is None or result.margin is None:
        return f"{result.gate}: {result.reason}"
    value, limit, margin = map(number, (result.value, result.limit, result.margin))
    return f"{result.metric} is {value}, limit {result.operator} {limit}, margin {margin}"


def number(value: float) -> str:
    """A figure as text: whole numbers whole, others with six digits."""
    return f"{value:.0f}" if value.is_integer() else f"{value:.6g}"


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
            failure = ElementTree.SubElement(case, "failure", message=describe(result), type="GateFailed")
            failure.text = describe(result)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True).decode()
    write_text("".join(f"{printable(line)}\n" for line in text.split("\n")), path)  # XML has no control characters


def _judge_one(gate: Gate, figure: Figure | None) -> GateResult:
    value = None if figure is None else figure.value
    reason = figure.reason if figure else None
    if value is None:
        reason = f"not measured: {reason}" if reason else "not measured"
    elif not math.isfinite(value):
        value, reason = None, f"measured as {value}, which keeps no limit"
    margin = None if value is None else _margin(gate, value)
    return GateResult(
        gate=str(gate),
        metric=gate.metric,
        operator=gate.operator,
        limit=gate.limit,
        value=value,
        margin=margin,
        passed=value is not None and _COMPARE[gate.operator](value, gate.limit),
        reason=reason if value is None else None,
    )


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
    for kind, command in _MADE_BY.items():
        others = _bare_names(figures({kind: None}, models=MODELS)) - _bare_names(known)
        if any(metric == name or metric.endswith(f".{name}") for name in others):
            return f"{metric} is not measured here; {command} does it, and a run"
    cure = f"the nearest are {', '.join(near)}" if near else "the names are those of the reports' fields"
    return f"no figure is named {metric}; {cure}"


def _bare_names(known: Iterable[str]) -> set[str]:
    """The names, and those of models and of pairs of them without the models."""
    qualified = {name.partition(".")[2] for name in known if not name.startswith(_PROOF)}
    return {*known, *qualified} - {""}


def _figures_of_run(reports: Mapping[str, AnyReport | None], recipe: Recipe) -> dict[str, Figure]:
    tasks = (recipe.task.name,) if recipe.task else ()
    return figures(reports, product=MODELS[-1], models=(*MODELS, *(("torch",) if tasks else ())), tasks=tasks)


def _unqualified(found: Mapping[str, Figure], product: str | None) -> dict[str, Figure]:
    """The product's figures without its name, and those of the proof whose names no measured figure has."""
    qualifier = "".join((product or "").split()) + "."
    of_product = {name.removeprefix(qualifier): figure for name, figure in found.items() if name.startswith(qualifier)}
    measured = {*ModelEvaluation.model_fields, *ModelBenchmark.model_fields}
    proven = {name.removeprefix(_PROOF): figure for name, figure in found.items() if name.startswith(_PROOF)}
    return {name: figure for name, figure in proven.items() if name not in measured} | of_product


def _of_report(kind: str, report: AnyReport | None, keys: Keys) -> Named:
    absent = f"there is no {kind}.json"
    if kind != "verification":
        yield from _of_record(KINDS[kind], report, "", keys, absent)
        return
    proof = report if isinstance(report, VerificationReport) else None
    yield "verified", Figure(float(proof.passed) if proof else None, absent)
    yield from _of_record(VerificationSummary, proof and proof.summary, kind, keys, absent)


def _of_record(kind: type[Record], record: Record | None, name: str, keys: Keys, reason: str | None) -> Named:
    """The figures of a record's fields, whether the record is there or not."""
    if record is not None:
        reason = getattr(record, "reason", None)
    for field, information in kind.model_fields.items():
        value = getattr(record, field, None)
        if field in _CENTRES:
            yield name, Figure(value, reason)
        if field.endswith(_INTERVAL):
            centre = _join(name, _centre_of(field, kind))
            yield f"{centre}.low", Figure(value and value[0], reason)
            yield f"{centre}.high", Figure(value and value[1], reason)
        else:
            yield from _of_field(_without_none(information.annotation), value, name, field, keys, reason)


def _of_field(annotation: Any, value: Any, name: str, field: str, keys: Keys, reason: str | None) -> Named:
    """The figures of a number, a record, or several that have names; none of any other value.

    Args:
        name: of the record that has the field.
    """
    path, inner = _join(name, field), next(iter(get_args(annotation)), None)
    if annotation in (int, float):
        yield path, Figure(value, reason)
    elif _is_record(annotation):
        yield from _of_record(annotation, value, path, keys, reason)
    elif get_origin(annotation) is dict:
        yield from _of_table(get_args(annotation)[1], value or {}, name, field, keys, reason)
    elif get_origin(annotation) is tuple and _has_label(inner):
        for record in value or ():
            yield from _of_record(type(record), record, _join(path, _label(record)), keys, reason)
        if not value:
            yield f"{path}.", Figure(None, reason or f"the report has no {path}")


def _of_table(kind: Any, table: Mapping[str, Any], name: str, field: str, keys: Keys, reason: str | None) -> Named:
    """The figures of a table of numbers; or of one of models, of pairs of them or of tasks, without the field's name.

    Args:
        kind: of the table's values.
        name: of the record that has the table in its field.
    """
    if kind in (int, float):
        yield from _of_numbers(table, _join(name, field), reason)
        return
    for key in dict.fromkeys((*table, *keys.get(field, ()))):
        path, absent = _join(name, key), f"{key} was not measured" if table else reason
        if _is_record(kind):
            yield from _of_record(kind, table.get(key), path, keys, absent)
        elif get_origin(kind) is dict and get_args(kind)[1] is float:
            yield from _of_numbers(table.get(key, {}), path, absent)


def _of_numbers(table: Mapping[str, float], name: str, reason: str | None) -> Named:
    for key, value in table.items():
        yield f"{name}.{key}", Figure(value)
    if not table:
        yield f"{name}.", Figure(None, reason)


def _without_none(annotation: Any) -> Any:
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(annotation) and len(kinds) == 1 else annotation


def _is_record(annotation: Any) -> bool:
    return isclass(annotation) and issubclass(annotation, Record)


def _has_label(kind: Any) -> bool:
    return _is_record(kind) and (kind is PointBenchmark or "name" in kind.model_fields)


def _label(record: Any) -> str:
    """What tells a record from the others of its kind: its name, or the grid's `128x64x1.SDPA`."""
    if isinstance(record, PointBenchmark):
        return f"{record.prompt_tokens}x{record.output_tokens}x{record.batch_size}.{record.attention_backend}"
    return str(record.name)


def _centre_of(field: str, kind: type[Record]) -> str:
    """The field whose interval this one is: `similarity` of similarity_ci95, `kl_mean_nats` of kl_mean_ci95, which has
    its unit left out, and the whole record of ci95."""
    stem = field.removesuffix(_INTERVAL).removesuffix("_")
    if not stem or stem in kind.model_fields:
        return stem
    return next(name for name in kind.model_fields if name.startswith(f"{stem}_") and name != field)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
