"""A benchmark's report in the shapes that other tools read: llm_bench's JSON, CSV and Markdown."""

import csv
import io
from typing import Any

from ovexport.numbers import with_interval, written
from ovexport.reports import BenchmarkReport, Generation, PointBenchmark, Ratio

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
_AVERAGED = (
    "generation_time",
    "latency",
    "first_latency",
    "second_avg_latency",
    "first_infer_latency",
    "second_infer_avg_latency",
    "tokenization_time",
    "detokenization_time",
)
_DIGITS = 5
_UNKNOWN = ""


def as_csv(report: BenchmarkReport) -> str:
    """A line for each model at each point."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_rows(report))
    return text.getvalue()


def as_markdown(report: BenchmarkReport) -> str:
    """The table of as_csv, and one of the ratios with their 95 % intervals, where there are any."""
    rows = [[_cell(row[column]) for column in _COLUMNS] for row in _rows(report)]
    ratios = [
        [name, *map(str, (point.attention_backend, point.batch_size, point.prompt_tokens, point.output_tokens)), *both]
        for point in report.grid
        for name, ratio in point.ratios.items()
        for both in [[_shown(one) for one in (ratio.time_to_first_token, ratio.time_per_output_token)]]
    ]
    header = ["ratio", "backend", "batch", "prompt", "output", "time to first token", "time per output token"]
    tables = [_table(list(_COLUMNS), rows)] + ([_table(header, ratios)] if ratios else [])
    return "\n".join(tables)


def course(report: BenchmarkReport) -> str:
    """How many rounds were measured, and what ended them."""
    conditions = report.conditions
    endings = {
        "precision": f"every ratio was known within {conditions.get('precision', 0):.1%}",
        "time_limit_s": f"the time limit of {conditions.get('time_limit_s', 0):g} s was reached",
        "pairs": "all rounds were done",
    }
    ended = conditions.get("ended_by", {})
    how = "; ".join(endings[by] + (f" ({backend})" if len(ended) > 1 else "") for backend, by in ended.items())
    sessions = "1 session" if conditions["sessions"] == 1 else f"{conditions['sessions']} sessions"
    rounds = f"{conditions['pairs']} interleaved rounds in {sessions}"
    return f"{rounds}: {how}" if how else rounds


def as_llm_bench(report: BenchmarkReport) -> dict[str, Any]:
    """openvino.genai's llm_bench report: the first warm-up as iteration 0, then a result for each round.

    Its fields, units and rounding are those of llm_bench, whose word for what was not measured is an empty text. Memory
    is that of a process of its own: of loading, and of the generation that iteration 0 stands for.

    Raises:
        ValueError: the report is of several models or points, and llm_bench's of one.

    Source: tools/llm_bench/llm_bench_utils/output_json.py of openvino.genai.
    """
    if len(report.models) > 1 or len(report.grid) > 1:
        raise ValueError("llm_bench's report is of one model at one point")
    name, model = next(iter(report.models.items()))
    point = report.grid[0]
    results = [_iteration(number, one, point) for number, one in enumerate(model.generations)]
    if results and model.generation_memory:
        results[0]["max_rss_mem"] = _mebibytes(model.generation_memory.peak_rss_bytes)
    return {
        "metadata": {
            "model": name,
            "framework": "ov",
            "device": report.conditions["device"],
            "precision": model.weight_precision,
            "num_beams": 1,
            "batch_size": point.batch_size,
        },
        "perfdata": {
            "compile_time": model.load_time_ms / 1000,
            "results": results,
            "initial_sys_mem(MiB)": _UNKNOWN,
            "initial_rss_mem(MiB)": _UNKNOWN,
            "compile_max_rss_mem(MiB)": _mebibytes(model.load_memory.peak_rss_bytes) if model.load_memory else _UNKNOWN,
            "compile_max_sys_mem(MiB)": _UNKNOWN,
            "compile_max_increase_rss_mem(MiB)": _UNKNOWN,
            "compile_max_increase_sys_mem(MiB)": _UNKNOWN,
            "results_averaged": _averaged(results[1:], point.batch_size),
        },
    }


def _iteration(number: int, one: Generation, point: PointBenchmark) -> dict[str, Any]:
    return {
        "iteration": number,
        "input_size": point.prompt_tokens * point.batch_size,
        "infer_count": point.output_tokens,
        "output_size": point.output_tokens * point.batch_size,
        "generation_time": round(one.whole_ms / 1000, _DIGITS),
        "latency": round(one.whole_ms / point.output_tokens, _DIGITS),
        "first_latency": round(one.first_token_ms, _DIGITS),
        "second_avg_latency": round(one.output_token_ms, _DIGITS),
        "first_infer_latency": round(one.first_inference_ms, _DIGITS),
        "second_infer_avg_latency": round(one.other_inferences_ms, _DIGITS),
        "tokenization_time": _UNKNOWN if one.tokenization_ms is None else round(one.tokenization_ms, _DIGITS),
        "detokenization_time": _UNKNOWN if one.detokenization_ms is None else round(one.detokenization_ms, _DIGITS),
        "prompt_idx": 0,
        "result_md5": list(one.result_md5),
        "start": one.began,
        "end": one.ended,
        "second_token_throughput": _throughput(one.output_token_ms, point.batch_size),
    }


def _averaged(results: list[dict[str, Any]], batch_size: int) -> dict[str, float]:
    """Means of the results after the warm-up; the throughput is that of the mean latency."""
    columns = {key: [one[key] for one in results if one[key] != _UNKNOWN] for key in _AVERAGED}
    means = {key: round(sum(values) / len(values), _DIGITS) for key, values in columns.items() if values}
    return means | {"second_token_throughput": _throughput(means["second_avg_latency"], batch_size)}


def _throughput(latency_ms: float, batch_size: int) -> float:
    return round(batch_size * 1000 / latency_ms, _DIGITS)


def _mebibytes(count: int) -> float:
    return round(count / 2**20, _DIGITS)


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


def _shown(ratio: Ratio) -> str:
    return with_interval(ratio.median, ratio.ci95, ".3f")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return written(value, ".3f") if isinstance(value, float) else str(value)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
