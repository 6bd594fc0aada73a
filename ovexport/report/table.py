"""The one table: size, quality and speed of bf16, plain and int4. Terminal, page and card show these very rows."""

from dataclasses import dataclass
from pathlib import Path

from ovexport.artifacts import RunFolder, read_record
from ovexport.reports import (
    BenchmarkReport,
    EvaluationReport,
    LatencyRatios,
    ModelBenchmark,
    ModelEvaluation,
    SearchReport,
    VerificationReport,
)

TITLES = {"bf16": "BF16", "plain": "INT4, not tuned", "int4": "INT4, tuned", "torch": "tuned, in torch"}
NOT_MEASURED = "–"


@dataclass(frozen=True, slots=True)
class Findings:
    """The reports of a run; None for one that it does not have."""

    verification: VerificationReport | None
    evaluation: EvaluationReport | None
    benchmark: BenchmarkReport | None
    search: SearchReport | None = None


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """A figure with its text per model."""

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
    search = there(folder.search.name)
    return Findings(
        verification=read_record(verification, VerificationReport) if verification else None,
        evaluation=read_record(evaluation, EvaluationReport) if evaluation else None,
        benchmark=read_record(benchmark, BenchmarkReport) if benchmark else None,
        search=read_record(search, SearchReport) if search else None,
    )


def comparison(findings: Findings) -> tuple[tuple[str, ...], tuple[ComparisonRow, ...]]:
    """The models and the rows of the table."""
    evaluated = findings.evaluation.models if findings.evaluation else {}
    benched = findings.benchmark.models if findings.benchmark else {}
    names = tuple(dict.fromkeys((*evaluated, *benched)))
    rows: list[ComparisonRow] = []

    def quality(title: str, field: str, form: str) -> None:
        rows.append(ComparisonRow(title, tuple(_text(evaluated.get(name), field, form) for name in names)))

    if benched:
        rows.append(ComparisonRow("weights on disk, MB", tuple(_megabytes(benched.get(name)) for name in names)))
    if evaluated:
        quality("perplexity per token", "perplexity", ".3f")
        quality("KL from BF16, mean, nats", "kl_mean_nats", ".5f")
        quality("KL from BF16, 99 %, nats", "kl_p99_nats", ".5f")
        quality("same likeliest token", "same_top1", ".2%")
        quality("similarity of answers", "similarity", ".4f")
        quality("first divergent token (FDT)", "fdt", ".1f")
        quality("share of divergent tokens (SDT norm)", "sdt_norm", ".2%")
    if findings.evaluation:
        rows += _task_rows(findings.evaluation, names)
    if findings.benchmark:
        rows += _latency_rows(findings.benchmark, names)
    return tuple(TITLES.get(name, name) for name in names), tuple(rows)


def _task_rows(evaluation: EvaluationReport, names: tuple[str, ...]) -> list[ComparisonRow]:
    """The metric that counts of each task, and the likelihood of the right answers where there are choices."""
    rows = []
    for task, conditions in evaluation.conditions.get("tasks", {}).items():
        figures = [evaluation.models[name].tasks.get(task, {}) if name in evaluation.models else {} for name in names]
        for figure, title in ((conditions["metric"], conditions["metric"]), ("answer_nll_nats", "answers' NLL, nats")):
            values = tuple(_with_error(one, figure) for one in figures)
            if any(value != NOT_MEASURED for value in values):
                rows.append(ComparisonRow(f"{task}, {title}", values))
    return rows


def _with_error(figures: dict[str, float], name: str) -> str:
    if name not in figures:
        return NOT_MEASURED
    error = figures.get(f"{name}_stderr")
    return f"{figures[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _latency_rows(benchmark: BenchmarkReport, names: tuple[str, ...]) -> list[ComparisonRow]:
    models, first = benchmark.models, next(iter(benchmark.models))

    def milliseconds(field: str) -> tuple[str, ...]:
        return tuple(f"{getattr(models[name], field).median:.2f}" if name in models else NOT_MEASURED for name in names)

    def whole(field: str) -> tuple[str, ...]:
        return tuple(f"{getattr(models[name], field):.0f}" if name in models else NOT_MEASURED for name in names)

    def over(reference: str, field: str) -> ComparisonRow:
        ratios = [benchmark.ratios.get(f"{name}/{reference}") for name in names]
        title = f"  over {TITLES.get(reference, reference)} (95 % interval)"
        return ComparisonRow(title, tuple(_ratio(ratio, field) for ratio in ratios))

    references = [name for name in (first, "plain") if name in models and name != names[-1]]
    return [
        ComparisonRow("time to first token, ms", milliseconds("time_to_first_token_ms")),
        *(over(reference, "time_to_first_token") for reference in dict.fromkeys(references)),
        ComparisonRow("time per output token, ms", milliseconds("time_per_output_token_ms")),
        *(over(reference, "time_per_output_token") for reference in dict.fromkeys(references)),
        ComparisonRow("tokens per second", whole("throughput_tokens_per_s")),
        ComparisonRow("load time, ms", whole("load_time_ms")),
        ComparisonRow("peak memory, MB", tuple(_peak(models.get(name)) for name in names)),
    ]


def _text(model: ModelEvaluation | None, field: str, form: str) -> str:
    value = getattr(model, field) if model else None
    return NOT_MEASURED if value is None else format(value, form)


def _megabytes(model: ModelBenchmark | None) -> str:
    return NOT_MEASURED if model is None else f"{model.weight_bytes / 1e6:.2f}"


def _peak(model: ModelBenchmark | None) -> str:
    return NOT_MEASURED if model is None or model.peak_rss_bytes is None else f"{model.peak_rss_bytes / 1e6:.0f}"


def _ratio(ratios: LatencyRatios | None, field: str) -> str:
    if ratios is None:
        return NOT_MEASURED
    value = getattr(ratios, field)
    return f"{value.median:.2f} ({value.ci95[0]:.2f}–{value.ci95[1]:.2f})"
