"""A benchmark's report in the shapes that other tools read: llm_bench's JSON, CSV and Markdown."""

import csv
import io
from typing import Any

from ovexport.reports import BenchmarkReport, ModelBenchmark, PointBenchmark

_COLUMNS = (
    "model",
    "attention_backend",
    "batch_size",
    "prompt_tokens",
    "output_tokens",
    "time_to_first_token_ms",
    "time_to_first_token_p90_ms",
    "time_to_first_token_p99_ms",
    "time_per_output_token_ms",
    "inter_token_latency_p90_ms",
    "inter_token_latency_p99_ms",
    "throughput_tokens_per_s",
    "load_time_ms",
    "peak_rss_bytes",
    "weight_bytes",
    "share_of_bandwidth",
)


def as_csv(report: BenchmarkReport) -> str:
    """A line for each model at each point."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(report))
    return text.getvalue()


def as_markdown(report: BenchmarkReport) -> str:
    """The table of as_csv, and one of the ratios with their 95 % intervals."""
    rows = [[_cell(row[column]) for column in _COLUMNS] for row in _rows(report)]
    ratios = [
        [name, *map(str, (point.attention_backend, point.batch_size, point.prompt_tokens, point.output_tokens)), *both]
        for point in report.grid
        for name, ratio in point.ratios.items()
        for both in [
            [
                f"{one.median:.3f} ({one.ci95[0]:.3f}–{one.ci95[1]:.3f})"
                for one in (ratio.time_to_first_token, ratio.time_per_output_token)
            ]
        ]
    ]
    header = ["ratio", "backend", "batch", "prompt", "output", "time to first token", "time per output token"]
    tables = [_table(list(_COLUMNS), rows)] + ([_table(header, ratios)] if ratios else [])
    return "\n".join(tables)


def as_llm_bench(report: BenchmarkReport) -> dict[str, Any]:
    """openvino.genai's llm_bench report: a result for each round, the warm-up not among them.

    What it has and we do not measure, as tokens go in and out, is None.

    Raises:
        ValueError: the report is of several models or points, and llm_bench's of one.
    """
    if len(report.models) > 1 or len(report.grid) > 1:
        raise ValueError("llm_bench's report is of one model at one point")
    name = next(iter(report.models))
    results = _iterations(report.grid[0], report.models[name])
    averaged = {
        key: sum(one[key] for one in results) / len(results)
        for key in ("generation_time", "latency", "first_latency", "second_avg_latency", "second_token_throughput")
    }
    return {
        "metadata": {
            "model": name,
            "framework": "ov",
            "device": report.conditions["device"],
            "precision": report.conditions["runtime"][name].get("INFERENCE_PRECISION_HINT"),
            "num_beams": 1,
            "batch_size": report.conditions["batch_size"],
        },
        "perfdata": {
            "compile_time": report.models[name].load_time_ms / 1000,
            "results": results,
            "results_averaged": averaged,
        },
    }


def _iterations(point: PointBenchmark, model: ModelBenchmark) -> list[dict[str, Any]]:
    rounds = zip(
        model.time_to_first_token_ms.samples,
        model.time_per_output_token_ms.samples,
        model.generation_ms.samples if model.generation_ms else (),
        strict=True,
    )
    return [
        {
            "iteration": iteration,
            "input_size": point.prompt_tokens * point.batch_size,
            "infer_count": point.output_tokens,
            "output_size": point.output_tokens * point.batch_size,
            "generation_time": whole / 1000,
            "latency": whole / point.output_tokens,
            "first_latency": first,
            "second_avg_latency": following,
            "first_infer_latency": None,
            "second_infer_avg_latency": None,
            "tokenization_time": None,
            "detokenization_time": None,
            "prompt_idx": 0,
            "result_md5": [],
            "start": None,
            "end": None,
            "max_rss_mem": None if model.peak_rss_bytes is None else model.peak_rss_bytes / 2**20,
            "second_token_throughput": 1000 * point.batch_size / following,
        }
        for iteration, (first, following, whole) in enumerate(rounds, 1)
    ]


def _rows(report: BenchmarkReport) -> list[dict[str, Any]]:
    return [
        {
            "model": name,
            "attention_backend": point.attention_backend,
            "batch_size": point.batch_size,
            "prompt_tokens": point.prompt_tokens,
            "output_tokens": point.output_tokens,
            "time_to_first_token_ms": model.time_to_first_token_ms.median,
            "time_to_first_token_p90_ms": model.time_to_first_token_ms.p90,
            "time_to_first_token_p99_ms": model.time_to_first_token_ms.p99,
            "time_per_output_token_ms": model.time_per_output_token_ms.median,
            "inter_token_latency_p90_ms": model.inter_token_latency_ms and model.inter_token_latency_ms.p90,
            "inter_token_latency_p99_ms": model.inter_token_latency_ms and model.inter_token_latency_ms.p99,
            "throughput_tokens_per_s": model.throughput_tokens_per_s,
            "load_time_ms": model.load_time_ms,
            "peak_rss_bytes": model.peak_rss_bytes,
            "weight_bytes": model.weight_bytes,
            "share_of_bandwidth": model.limit and model.limit.share_of_bandwidth,
        }
        for point in report.grid
        for name, model in point.models.items()
    ]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
