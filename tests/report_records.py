"""Every figure that a run's reports can hold, put beside those that the run measured."""

from pathlib import Path
from typing import Any

from ovexport.artifacts import RunFolder
from ovexport.reports import (
    BenchmarkReport,
    Comparison,
    Estimate,
    EvaluationReport,
    GateReport,
    GateResult,
    IsolationStep,
    MachineLimits,
    ModelBenchmark,
    ModelEvaluation,
    PeakMemory,
    PhysicalLimit,
    PointBenchmark,
    VerificationReport,
    WorstAnswer,
)
from ovexport.storage.records import read_record, write_record

SCRIPT = "<script>document.title = 'run'</script>"
MB = 1_000_000
STEPS = ("weights", "kv_cache", "dynamic_quantization", "activations", "deployment")


def fill(folder: RunFolder, *, passed: bool = True) -> RunFolder:
    """Write all that is optional into the run's reports.

    Args:
        passed: whether every gate did.
    """
    _update(folder.path / "evaluation.json", EvaluationReport, _evaluation)
    _update(folder.path / "benchmark.json", BenchmarkReport, _benchmark)
    _update(folder.path / "verification.json", VerificationReport, _verification)
    write_record(gate_report(passed=passed), folder.path / "gates.json")
    return folder


def gate_report(*, passed: bool) -> GateReport:
    """Two gates on measured figures, and where one is to fail, one on a figure that was not measured."""
    gates = [
        GateResult(
            gate="similarity>=0.5",
            metric="similarity",
            operator=">=",
            limit=0.5,
            value=0.83,
            margin=0.33,
            passed=True,
        ),
        GateResult(
            gate="kl_mean_nats<0.05",
            metric="kl_mean_nats",
            operator="<",
            limit=0.05,
            value=0.01,
            margin=0.04,
            passed=True,
        ),
    ]
    if not passed:
        gates.append(
            GateResult(
                gate="peak_rss_bytes<1e6",
                metric="peak_rss_bytes",
                operator="<",
                limit=1e6,
                value=None,
                margin=None,
                passed=False,
                reason="memory was not measured",
            )
        )
    return GateReport(passed=passed, gates=tuple(gates))


def _update(path: Path, kind: Any, change: Any) -> None:
    report = read_record(path, kind)
    changed = report.model_copy(update=change(report))
    kind.model_validate_json(changed.model_dump_json())
    write_record(changed, path)


def _evaluation(report: EvaluationReport) -> dict[str, Any]:
    models = {
        name: model if name == report.reference else model.model_copy(update=_quality(model))
        for name, model in report.models.items()
    }
    return {
        "models": models,
        "conditions": report.conditions | {"similarity_mode": "strict"},
        "comparisons": {
            "int4 - plain": _compared(-0.004, -0.0042, -0.0038, "lower", "tie"),
        },
    }


def _compared(value: float, low: float, high: float, kl: Any, nll: Any) -> Comparison:
    return Comparison(
        kl_mean_nats=Estimate(value=value, ci95=(low, high)),
        kl_verdict=kl,
        nll_mean_nats=Estimate(value=value / 10, ci95=(low / 10, high / 10)),
        nll_verdict=nll,
    )


def _quality(model: ModelEvaluation) -> dict[str, Any]:
    mean = model.kl_mean_nats or 0.0
    return {
        "kl_mean_ci95": (0.97 * mean, 1.03 * mean),
        "similarity_ci95": (0.7, 0.9),
        "perplexity_ratio": Estimate(value=0.9986, ci95=(0.9961, 1.0012)),
        "worst_answers": (
            WorstAnswer(
                prompt=f"Tell me a story. {SCRIPT}",
                reference=f"Once upon a time there was a girl. {SCRIPT}",
                candidate="Once upon a time there was a small boy, and nobody knew him.",
                similarity=0.3125,
                first_difference=29,
            ),
            WorstAnswer(prompt="", reference="The end", candidate="The", similarity=None, first_difference=3),
        ),
        "isolation": tuple(
            IsolationStep(
                name=name,
                settings={"INFERENCE_PRECISION_HINT": "bf16" if name in STEPS[3:] else "f32"},
                kl_mean_nats=mean * (1 + 0.1 * number),
                kl_mean_ci95=(0.95 * mean * (1 + 0.1 * number), 1.05 * mean * (1 + 0.1 * number)),
                same_top1=0.95,
                perplexity=model.perplexity,
                reference_kl_mean_nats=1e-5 * number,
            )
            for number, name in enumerate(STEPS)
        ),
    }


def _benchmark(report: BenchmarkReport) -> dict[str, Any]:
    models = {name: model.model_copy(update=_speed(model)) for name, model in report.models.items()}
    points = [
        PointBenchmark(
            prompt_tokens=prompt,
            output_tokens=16,
            batch_size=batch,
            attention_backend=backend,
            models=models,
            ratios=report.ratios,
        )
        for prompt, batch, backend in ((32, 1, "SDPA"), (32, 4, "SDPA"), (512, 1, "PA"))
    ]
    machine = MachineLimits(bandwidth_bytes_per_s=21.4e9, operations_per_s={"f32": 1.2e11, "bf16": 2.3e11})
    return {"models": models, "grid": tuple(points), "machine": machine}


def _speed(model: ModelBenchmark) -> dict[str, Any]:
    at_best = model.weight_bytes / 21.4e6
    first = 0.3 * model.time_to_first_token_ms.median
    return {
        "load_memory": PeakMemory(peak_rss_bytes=190 * MB, peak_anonymous_bytes=120 * MB, peak_file_bytes=80 * MB),
        "generation_memory": PeakMemory(
            peak_rss_bytes=210 * MB, peak_anonymous_bytes=150 * MB, peak_file_bytes=62 * MB
        ),
        "limit": PhysicalLimit(
            bytes_per_token=model.weight_bytes,
            time_per_output_token_ms=at_best,
            share_of_bandwidth=at_best / model.time_per_output_token_ms.median,
            operations_first_token=4_000_000_000,
            time_to_first_token_ms=first,
            share_of_compute=0.3,
        ),
    }


def _verification(report: VerificationReport) -> dict[str, Any]:
    layers = [
        layer.model_copy(update={"weight_error": 0.06 + 0.0004 * number, "twin_weight_error": 0.055 + 0.0005 * number})
        for number, layer in enumerate(report.layers)
    ]
    return {"layers": tuple(layers)}
