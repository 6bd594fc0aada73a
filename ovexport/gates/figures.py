"""Every figure of the reports by its name, with its value, its 95 % interval and what it means.

The names are those of the reports' fields. A model's figure stands behind the model's name, `plain.kl_mean_nats`, and
without one it is the product's; behind two models' names stands their ratio, `int4/bf16.time_per_output_token`, or
their difference, `int4-plain.kl_mean_nats`. `.low` and `.high` are the ends of a figure's 95 % interval, `.value` the
figure without it; `.p90` and `.p99` are order statistics of a latency, whose own name means the median.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import isclass
from types import NoneType
from typing import Any, get_args, get_origin

from ovexport.artifacts import MODELS, RunFolder
from ovexport.recipe import Recipe
from ovexport.reports import (
    BenchmarkReport,
    EvaluationReport,
    Interval,
    Meaning,
    ModelBenchmark,
    ModelEvaluation,
    PointBenchmark,
    VerificationReport,
    VerificationSummary,
)
from ovexport.storage.records import Record, read_record

AnyReport = VerificationReport | EvaluationReport | BenchmarkReport
KINDS: dict[str, type[AnyReport]] = {
    "verification": VerificationReport,
    "evaluation": EvaluationReport,
    "benchmark": BenchmarkReport,
}
"""The reports that have figures, by the name of their file."""

PROOF = "verification."
_CENTRES = ("value", "median")
_INTERVAL = "ci95"
_NORMAL_95 = 1.96
_UNITS = {
    "tokens_per_s": "tokens/s",
    "bytes_per_s": "bytes/s",
    "operations_per_s": "operations/s",
    "_nats": "nats",
    "_ms": "ms",
    "bytes": "bytes",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure that a gate can be set on; a value of None has a reason.

    Attributes:
        ci95: its 95 % interval, where it has one.
        over: what the interval was taken over, such as "24 prompts", or what is too little for one; None where the
            figure never has an interval, or where it is not known.
        meaning: what it says.
        file: the report that it stands in.
    """

    value: float | None
    reason: str | None = None
    ci95: Interval | None = field(default=None, kw_only=True)
    over: str | None = field(default=None, kw_only=True)
    meaning: Meaning | None = field(default=None, kw_only=True, compare=False)
    file: str = field(default="", kw_only=True, compare=False)


Named = Iterator[tuple[str, Figure]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What the figures of a part of a report have in common.

    Attributes:
        keys: by field, the names that a table has to have whether the report is there or not.
        over: by the name of an interval's field, what it was taken over; by "", every other one.
        reason: why figures are not there.
        meaning: of the part as a whole.
    """

    keys: Mapping[str, Sequence[str]]
    over: Mapping[str, str | None]
    reason: str | None = None
    meaning: Meaning | None = None

    def figure(self, value: Any) -> Figure:
        """A figure of the part that has no interval."""
        return Figure(value, self.reason, meaning=self.meaning)

    def estimate(self, value: Any, interval: Interval | None, interval_field: str = "") -> Figure:
        """A figure of the part that has an interval, unless there was too little for one."""
        over = None if value is None else self.over.get(interval_field, self.over.get(""))
        return Figure(value, self.reason, ci95=interval, over=over, meaning=self.meaning)


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
    figures = {
        "".join(name.split()): replace(figure, file=f"{report_name}.json")
        for report_name, report in reports.items()
        for name, figure in _of_report(report_name, report, keys)
    }
    return figures | _unqualified(figures, product or (names[-1] if names else None))


def run_figures(folder: RunFolder, recipe: Recipe) -> dict[str, Figure]:
    """Every figure of a run, those included that it has not measured.

    Raises:
        ArtifactError: a report is corrupt.
    """
    paths = {report_name: folder.path / f"{report_name}.json" for report_name in KINDS}
    reports = {
        report_name: read_record(path, KINDS[report_name]) if path.is_file() else None
        for report_name, path in paths.items()
    }
    return figures_of_run(reports, recipe)


def figures_of_run(reports: Mapping[str, AnyReport | None], recipe: Recipe) -> dict[str, Figure]:
    """Every figure that a run of a recipe has, or will have."""
    tasks = (recipe.task.name,) if recipe.task else ()
    return figures(reports, product=MODELS[-1], models=(*MODELS, *(("torch",) if tasks else ())), tasks=tasks)


def listed(known: Mapping[str, Figure], *, of_product_alone: bool = False) -> dict[str, Figure]:
    """The figures each once, by report: the product's without its name, then those of the other models.

    Args:
        of_product_alone: leave the other models out.
    """
    others = tuple(f"{name}{mark}" for name in (*MODELS[:-1], "torch") for mark in "./")
    own = [name for name, figure in known.items() if known.get(name.partition(".")[2]) is not figure]
    order = sorted(own, key=lambda name: name.startswith(others))
    kept = [name for name in order if not (of_product_alone and name.startswith(others))]
    return {name: known[name] for report_name in KINDS for name in kept if known[name].file == f"{report_name}.json"}


def unit_of(name: str) -> str:
    """The unit of a figure, which is in its name; empty for a count, a share or a ratio."""
    return next((unit for suffix, unit in _UNITS.items() if any(suffix in part for part in name.split("."))), "")


def _unqualified(figures: Mapping[str, Figure], product: str | None) -> dict[str, Figure]:
    """The product's figures without its name, and those of the proof whose names no measured figure has."""
    qualifier = "".join((product or "").split()) + "."
    of_product = {
        name.removeprefix(qualifier): figure for name, figure in figures.items() if name.startswith(qualifier)
    }
    measured = {*ModelEvaluation.model_fields, *ModelBenchmark.model_fields}
    proven = {name.removeprefix(PROOF): figure for name, figure in figures.items() if name.startswith(PROOF)}
    return {name: figure for name, figure in proven.items() if name not in measured} | of_product


def _of_report(report_name: str, report: AnyReport | None, keys: Mapping[str, Sequence[str]]) -> Named:
    source = Source(keys=keys, over=_intervals_over(report), reason=f"there is no {report_name}.json")
    if report_name != "verification":
        yield from of_record(KINDS[report_name], report, "", source)
        return
    proof = report if isinstance(report, VerificationReport) else None
    passed = _meaning(VerificationReport.model_fields["passed"].metadata)
    yield "verified", replace(source, meaning=passed).figure(float(proof.passed) if proof else None)
    yield from of_record(VerificationSummary, proof and proof.summary, report_name, source)


def _intervals_over(report: AnyReport | None) -> dict[str, str | None]:
    """What the intervals of a report were taken over, as Source has it."""
    conditions = getattr(report, "conditions", {})
    if isinstance(report, BenchmarkReport):
        return {"": f"{conditions['sessions']} sessions" if "sessions" in conditions else None}
    units, prompts = conditions.get("interval_units"), conditions.get("prompts")
    return {
        "": None if units is None else f"{units} {conditions['interval_over']}",
        "similarity_ci95": None if prompts is None else f"{prompts} prompts",
    }


def of_record(record_type: type[Record], record: Record | None, name: str, source: Source) -> Named:
    """The figures of a record's fields, whether the record is there or not."""
    if record is not None:
        source = replace(source, reason=getattr(record, "reason", None))
    intervals = {_centre_of(one, record_type): one for one in record_type.model_fields if one.endswith(_INTERVAL)}
    for field_name, information in record_type.model_fields.items():
        value = getattr(record, field_name, None)
        own = replace(source, meaning=_meaning(information.metadata) or source.meaning)
        if field_name in _CENTRES:
            interval = getattr(record, _INTERVAL, None)
            yield name, own.estimate(value, interval) if _INTERVAL in record_type.model_fields else own.figure(value)
        if field_name.endswith(_INTERVAL):
            yield from _of_interval(record_type, record, name, field_name, source)
        elif field_name in intervals:
            held = intervals[field_name]
            yield _join(name, field_name), own.estimate(value, getattr(record, held, None), held)
        else:
            yield from _of_field(_without_none(information.annotation), value, name, field_name, own)


def _of_interval(record_type: type[Record], record: Record | None, name: str, interval: str, source: Source) -> Named:
    """`.low` and `.high` of an interval, and `.value`, its centre alone."""
    centre = _centre_of(interval, record_type)
    path, ends = _join(name, centre), getattr(record, interval, None)
    held = centre or next(one for one in _CENTRES if one in record_type.model_fields)
    meaning = _meaning(record_type.model_fields[held].metadata) or source.meaning
    for end, value, text in (
        ("low", ends and ends[0], "lower end of the 95 % interval"),
        ("high", ends and ends[1], "upper end of the 95 % interval"),
        ("value", getattr(record, held, None), "without its interval"),
    ):
        told = Meaning(f"{path.rsplit('.', 1)[-1]}, {text}", meaning.better if meaning else None)
        yield f"{path}.{end}", replace(source, meaning=told).figure(value)


def _of_field(annotation: Any, value: Any, name: str, field_name: str, source: Source) -> Named:
    """The figures of a number, a record, or several that have names; none of any other value.

    Args:
        name: of the record that has the field.
    """
    path, inner = _join(name, field_name), next(iter(get_args(annotation)), None)
    if annotation in (int, float):
        yield path, source.figure(value)
    elif _is_record(annotation):
        yield from of_record(annotation, value, path, source)
    elif get_origin(annotation) is dict:
        yield from _of_table(get_args(annotation)[1], value or {}, name, field_name, source)
    elif get_origin(annotation) is tuple and _has_label(inner):
        for record in value or ():
            yield from of_record(type(record), record, _join(path, _label(record)), source)
        if not value:
            yield f"{path}.", replace(source, reason=source.reason or f"the report has no {path}").figure(None)


def _of_table(value_type: Any, table: Mapping[str, Any], name: str, field_name: str, source: Source) -> Named:
    """The figures of a table of numbers; or of one of models, of pairs of them or of tasks, without the field's name.

    Args:
        value_type: of the table's values.
        name: of the record that has the table in its field.
    """
    if value_type in (int, float):
        yield from _of_numbers(table, _join(name, field_name), source)
        return
    for key in dict.fromkeys((*table, *source.keys.get(field_name, ()))):
        path = _join(name, key)
        own = replace(source, reason=f"{key} was not measured") if table else source
        if _is_record(value_type):
            yield from of_record(value_type, table.get(key), path, own)
        elif get_origin(value_type) is dict and get_args(value_type)[1] is float:
            yield from _of_numbers(table.get(key, {}), path, own)


def _of_numbers(table: Mapping[str, float], name: str, source: Source) -> Named:
    """The figures of a table of numbers; one with a standard error beside it has an interval."""
    present = replace(source, reason=None, over={"": f"{table['items']:.0f} questions" if "items" in table else None})
    for key, value in table.items():
        path, error = f"{name}.{key}", table.get(f"{key}_stderr", math.nan)
        if not math.isfinite(error):
            yield path, present.figure(value)
            continue
        ends = (value - _NORMAL_95 * error, value + _NORMAL_95 * error)
        yield path, present.estimate(value, ends)
        for end, one in (("low", ends[0]), ("high", ends[1]), ("value", value)):
            yield f"{path}.{end}", present.figure(one)
    if not table:
        yield f"{name}.", source.figure(None)


def _meaning(metadata: Sequence[Any]) -> Meaning | None:
    return next((one for one in metadata if isinstance(one, Meaning)), None)


def _without_none(annotation: Any) -> Any:
    types = [one for one in get_args(annotation) if one is not NoneType]
    return types[0] if NoneType in get_args(annotation) and len(types) == 1 else annotation


def _is_record(annotation: Any) -> bool:
    return isclass(annotation) and issubclass(annotation, Record)


def _has_label(record_type: Any) -> bool:
    return _is_record(record_type) and (record_type is PointBenchmark or "name" in record_type.model_fields)


def _label(record: Any) -> str:
    """What tells a record from the others of its kind: its name, or the grid's `128x64x1.SDPA`."""
    if isinstance(record, PointBenchmark):
        return f"{record.prompt_tokens}x{record.output_tokens}x{record.batch_size}.{record.attention_backend}"
    return str(record.name)


def _centre_of(interval: str, record_type: type[Record]) -> str:
    """The field whose interval this one is: `similarity` of similarity_ci95, `kl_mean_nats` of kl_mean_ci95, which has
    its unit left out, and the whole record of ci95."""
    stem = interval.removesuffix(_INTERVAL).removesuffix("_")
    if not stem or stem in record_type.model_fields:
        return stem
    return next(name for name in record_type.model_fields if name.startswith(f"{stem}_") and name != interval)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
