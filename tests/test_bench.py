import numpy as np
import pytest

from ovexport.artifacts import read_record
from ovexport.bench import bench
from ovexport.bench.latency import ratio
from ovexport.errors import DataError, RecipeError
from ovexport.recipe import BenchSpec
from ovexport.reports import BenchmarkReport


def test_a_ratio_is_taken_pair_by_pair_so_drift_cancels() -> None:
    drift = np.linspace(1, 10, 40).reshape(4, 10)
    found = ratio((0.5 * drift).tolist(), drift.tolist(), seed=0)
    assert found.median == pytest.approx(0.5)
    assert found.ci95 == (pytest.approx(0.5), pytest.approx(0.5))
    with pytest.raises(ValueError, match="can't be paired"):
        ratio([[1.0]], [[1.0, 2.0]], seed=0)


def test_the_interval_of_a_ratio_covers_the_truth_though_sessions_differ() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(40):
        placement = generator.lognormal(0, 0.05, (2, 6, 1))
        first, second = generator.lognormal(0, 0.02, (2, 6, 8)) * placement
        low, high = ratio(first.tolist(), second.tolist(), seed, resamples=500).ci95
        covered += low <= 1.0 <= high
    assert covered >= 32


def test_the_report_of_a_run_holds_samples_ratios_and_conditions(finished_run) -> None:
    report = read_record(finished_run.path / "benchmark.json", BenchmarkReport)
    assert set(report.ratios) == {"plain/bf16", "int4/bf16", "int4/plain"}
    for model in report.models.values():
        assert len(model.time_to_first_token_ms.samples) == 6
        assert model.time_per_output_token_ms.median > 0
        assert model.peak_rss_bytes > model.weight_bytes > 0
        assert model.load_time_ms > 0
    runtime = report.conditions["runtime"]
    assert runtime["bf16"] == runtime["plain"] == runtime["int4"]
    assert runtime["int4"]["KV_CACHE_PRECISION"] == "u8"


def test_a_short_prompt_and_a_missing_device_are_refused(finished_run) -> None:
    models = {"int4": finished_run.ir("int4")}
    with pytest.raises(DataError, match="the prompt has 3 tokens"):
        bench(models, BenchSpec(), [1, 2, 3])
    with pytest.raises(RecipeError, match="device=NPU: not here; OpenVINO lists CPU"):
        bench(models, BenchSpec(device="NPU", prompt_tokens=1), [1, 2, 3])


def test_paged_attention_is_measured_with_prefix_caching_off(finished_run) -> None:
    spec = BenchSpec(attention_backend="PA", prompt_tokens=16, output_tokens=2, pairs=5, warmup=1)
    report = bench({"int4": finished_run.ir("int4")}, spec, list(range(2, 18)))
    assert report.conditions["prefix_caching"] is False
    assert report.models["int4"].time_to_first_token_ms.median > 0
