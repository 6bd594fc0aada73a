"""The one table: size, quality and speed, a column per model. Terminal, page and card show these very rows."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ovexport.artifacts import RunFolder
from ovexport.numbers import with_interval, written
from ovexport.report.names import PLAIN, PRODUCT, Titles, titles, tuned
from ovexport.reports import (
    BenchmarkReport,
    EvaluationReport,
    GateReport,
    ModelBenchmark,
    ModelEvaluation,
    SearchReport,
    SensitivityReport,
    VerificationReport,
)
from ovexport.storage.records import read_record

NOT_MEASURED = "–"


@dataclass(frozen=True, slots=True)
class Findings:
    """The reports of a run; None for one that it does not have."""

    verification: VerificationReport | None
    evaluation: EvaluationReport | None
    benchmark: BenchmarkReport | None
    search: SearchReport | None = None
    gates: GateReport | None = None
    sensitivities: SensitivityReport | None = None

    @property
    def titles(self) -> Titles:
        """What the models are called."""
        return titles(self.evaluation, self.benchmark)

    @property
    def tuned(self) -> bool | None:
        """Whether tuning is in the product's weights; None where it is not known."""
        return tuned(self.evaluation, self.benchmark)


@dataclass(frozen=True, slots=True)
class Column:
    """A model of a run.

    Attributes:
        title: what stands above the column.
        name: of the model in the run's reports.
    """

    title: str
    name: str
    findings: Findings

    @property
    def evaluation(self) -> ModelEvaluation | None:
        """The model in evaluation.json."""
        report = self.findings.evaluation
        return report.models.get(self.name) if report else None

    @property
    def benchmark(self) -> ModelBenchmark | None:
        """The model in benchmark.json."""
        report = self.findings.benchmark
        return report.models.get(self.name) if report else None


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """A figure with its text per column."""

    figure: str
    values: tuple[str, ...]


def read_findings(folder: RunFolder) -> Findings:
    """The reports that are in the run's folder.

    Raises:
        ArtifactError: one is corrupt.
    """

    def there(name: str) -> Path | None:
        path = folder.path / name
        return path if path.is_file() else None

    verification, evaluation, benchmark = map(there, ("verification.json", "evaluation.json", "benchmark.json"))
    search, gates = there(folder.search.name), there(folder.gates.name)
    sensitivities = there(folder.sensitivities.name)
    return Findings(
        verification=read_record(verification, VerificationReport) if verification else None,
        evaluation=read_record(evaluation, EvaluationReport) if evaluation else None,
        benchmark=read_record(benchmark, BenchmarkReport) if benchmark else None,
        search=read_record(search, SearchReport) if search else None,
        gates=read_record(gates, GateReport) if gates else None,
        sensitivities=read_record(sensitivities, SensitivityReport) if sensitivities else None,
    )


def columns_of(findings: Findings) -> tuple[Column, ...]:
    """A column for each model that was evaluated or benched."""
    evaluated = findings.evaluation.models if findings.evaluation else {}
    benched = findings.benchmark.models if findings.benchmark else {}
    called = findings.titles
    return tuple(Column(called[name], name, findings) for name in dict.fromkeys((*evaluated, *benched)))


def comparison(findings: Findings) -> tuple[tuple[str, ...], tuple[ComparisonRow, ...]]:
    """The models and the rows of the table of one run."""
    columns = columns_of(findings)
    return tuple(column.title for column in columns), comparison_rows(columns)


def comparison_rows(columns: Sequence[Column]) -> tuple[ComparisonRow, ...]:
    """The rows of the table; a figure that no column has is left out."""
    rows = (
        _row("weights on disk, MB", columns, lambda column: _benched(column, lambda one: _megabytes(one.weight_bytes))),
        *_quality_rows(columns),
        *_task_rows(columns),
        *_latency_rows(columns),
    )
    return tuple(row for row in rows if any(value != NOT_MEASURED for value in row.values))


def _row(title: str, columns: Sequence[Column], text: Callable[[Column], str | None]) -> ComparisonRow:
    return ComparisonRow(title, tuple(text(column) or NOT_MEASURED for column in columns))


def _benched(column: Column, text: Callable[[ModelBenchmark], str | None]) -> str | None:
    return text(column.benchmark) if column.benchmark else None


def _together(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once, in the order of their first coming."""
    return tuple(dict.fromkeys(names))


def _titles(columns: Sequence[Column]) -> Titles:
    """What the models of all the columns' runs are called; a model that runs call differently, by all those names."""
    every: dict[str, list[str]] = {}
    for findings in (column.findings for column in columns):
        for name, title in findings.titles.items():
            every.setdefault(name, []).append(title)
    return Titles({name: " or ".join(_together(called)) for name, called in every.items()})


def _quality_rows(columns: Sequence[Column]) -> list[ComparisonRow]:
    reports = [column.findings.evaluation for column in columns if column.findings.evaluation]
    modes = _together(str(report.conditions["similarity_mode"]) for report in reports if _has_mode(report))
    similarity = "similarity of answers" + (f", {' and '.join(modes)} mode" if modes else "")
    called = _titles(columns)
    source = " or ".join(called[name] for name in _together(report.reference for report in reports))

    def figure(title: str, field: str, form: str, interval: str = "") -> ComparisonRow:
        return _row(title, columns, lambda column: _figure(column.evaluation, field, form, interval))

    others = _together(
        name for report in reports for name in report.models if name not in (report.reference, PRODUCT, "torch")
    )
    return [
        figure("perplexity per token", "perplexity", ".3f"),
        _row(f"  over {source} (95 % interval)", columns, _perplexity_ratio),
        figure(f"KL from {source}, mean, nats", "kl_mean_nats", ".5f", "kl_mean_ci95"),
        *(_row(f"  less {called[other]} (95 % interval)", columns, partial(_less, other=other)) for other in others),
        figure(f"KL from {source}, 99 %, nats", "kl_p99_nats", ".5f"),
        figure("same likeliest token", "same_top1", ".2%", "same_top1_ci95"),
        figure(similarity, "similarity", ".4f", "similarity_ci95"),
        _row("  different answers to the prompts", columns, _different_answers),
        figure("first divergent token (FDT)", "fdt", ".1f"),
        figure("share of divergent tokens (SDT norm)", "sdt_norm", ".2%"),
    ]


def _has_mode(report: EvaluationReport) -> bool:
    return "similarity_mode" in report.conditions


def _figure(model: ModelEvaluation | None, field: str, form: str, interval: str) -> str | None:
    value = getattr(model, field) if model else None
    return None if value is None else with_interval(value, getattr(model, interval) if interval else None, form)


def _different_answers(column: Column) -> str | None:
    report, model = column.findings.evaluation, column.evaluation
    if report is None or model is None or model.different_answers is None:
        return None
    return f"{model.different_answers} of {report.conditions.get('prompts', '?')}"


def _perplexity_ratio(column: Column) -> str | None:
    report, model = column.findings.evaluation, column.evaluation
    if report is None or model is None or model.perplexity_ratio is None:
        return None
    ratio = model.perplexity_ratio
    tied = model.perplexity_verdict == "tie"
    return with_interval(ratio.value, ratio.ci95, ".4f") + (", a tie" if tied else "")


def _less(column: Column, other: str) -> str | None:
    report = column.findings.evaluation
    compared = report.comparisons.get(f"{column.name} - {other}") if report else None
    if compared is None:
        return None
    difference = compared.kl_mean_nats
    return with_interval(difference.value, difference.ci95, ".5f") + (", a tie" if compared.kl_verdict == "tie" else "")


def _task_rows(columns: Sequence[Column]) -> list[ComparisonRow]:
    """The metric that counts of each task, and the likelihood of the right answers where there are choices."""
    asked: dict[str, dict[str, Any]] = {}
    for column in columns:
        asked |= column.findings.evaluation.conditions.get("tasks", {}) if column.findings.evaluation else {}
    return [
        _row(f"{task}, {title}", columns, partial(_with_error, task=task, name=figure))
        for task, conditions in asked.items()
        for figure, title in ((conditions["metric"], conditions["metric"]), ("answer_nll_nats", "answers' NLL, nats"))
    ]


def _with_error(column: Column, task: str, name: str) -> str | None:
    figures = column.evaluation.tasks.get(task, {}) if column.evaluation else {}
    if name not in figures:
        return None
    error = figures.get(f"{name}_stderr")
    return written(figures[name], ".4f") + ("" if error is None else f" ± {written(error, '.4f')}")


def _latency_rows(columns: Sequence[Column]) -> list[ComparisonRow]:
    def median(field: str) -> Callable[[Column], str | None]:
        return lambda column: _benched(column, lambda one: written(getattr(one, field).median, ".2f"))

    def whole(title: str, field: str) -> ComparisonRow:
        return _row(title, columns, lambda column: _benched(column, lambda one: written(getattr(one, field), ".0f")))

    def over(field: str) -> list[ComparisonRow]:
        return [
            _row(
                f"  over {called[reference]} (95 % interval)",
                columns,
                partial(_ratio, reference=reference, field=field),
            )
            for reference in references
        ]

    called = _titles(columns)
    firsts = [next(iter(column.findings.benchmark.models)) for column in columns if column.findings.benchmark]
    references = _together((*firsts, PLAIN))
    return [
        _row("time to first token, ms", columns, median("time_to_first_token_ms")),
        *over("time_to_first_token"),
        _row("time per output token, ms", columns, median("time_per_output_token_ms")),
        *over("time_per_output_token"),
        _row("  share of the memory bandwidth", columns, lambda column: _benched(column, _share_of_bandwidth)),
        whole("tokens per second", "throughput_tokens_per_s"),
        whole("load time, ms", "load_time_ms"),
        _row("peak memory, MB", columns, lambda column: _benched(column, _peak)),
    ]


def _share_of_bandwidth(model: ModelBenchmark) -> str | None:
    return written(model.limit.share_of_bandwidth, ".0%") if model.limit else None


def _megabytes(count: int) -> str:
    return written(count / 1e6, ".2f")


def _peak(model: ModelBenchmark) -> str | None:
    return None if model.peak_rss_bytes is None else written(model.peak_rss_bytes / 1e6, ".0f")


def _ratio(column: Column, reference: str, field: str) -> str | None:
    report = column.findings.benchmark
    ratios = report.ratios.get(f"{column.name}/{reference}") if report else None
    if ratios is None:
        return None
    ratio = getattr(ratios, field)
    return with_interval(ratio.median, ratio.ci95, ".2f") + (", a tie" if holds_one(ratio.ci95) else "")


def holds_one(interval: tuple[float, float] | None) -> bool:
    """Whether a ratio's interval contains 1: the two are a tie. Without an interval there is no verdict."""
    return interval is not None and interval[0] <= 1 <= interval[1]
