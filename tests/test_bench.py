import csv
import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import count, islice
from pathlib import Path

import numpy as np
import openvino_genai
import pytest
from numpy.typing import NDArray

from ovexport.artifacts import RunFolder
from ovexport.bench import RuntimeAdapter, bench, loading, rounds, save_adapter, sessions
from ovexport.bench.formats import as_csv, as_llm_bench, as_markdown, course
from ovexport.bench.rounds import orders, ratio
from ovexport.errors import DataError, RecipeError, UnsupportedModelError
from ovexport.recipe import BenchSpec
from ovexport.report import plots
from ovexport.report.limits import promises
from ovexport.report.table import Findings, comparison
from ovexport.report.verdict import headlines
from ovexport.reports import BenchmarkReport
from ovexport.storage.records import read_record
from ovexport.storage.tensorfile import TensorFile, write_tensors

SHORT = BenchSpec(prompt_tokens=16, output_tokens=2, pairs=5, sessions=2, warmup=1, memory=False, limits=False)
PROMPT = list(range(2, 18))


@pytest.fixture
def adapter_file(finished_run: RunFolder, tmp_path: Path) -> Path:
    """The adapters that the run's int4 absorbed."""
    return save_adapter(finished_run.checkpoint, tmp_path / "adapter.safetensors")


def rewritten(file: Path, change: Callable[[str, NDArray], tuple[str, NDArray]]) -> Path:
    """A copy of an adapter in which each tensor has gone through `change`."""
    adapter = TensorFile(file)
    out = file.with_name("rewritten.safetensors")
    write_tensors(dict(change(name, np.array(adapter[name])) for name in adapter), out)
    return out


def test_a_ratio_is_taken_pair_by_pair_so_drift_cancels() -> None:
    drift = np.linspace(1, 10, 40).reshape(5, 8)
    found = ratio((0.5 * drift).tolist(), drift.tolist(), seed=0)
    assert found.median == pytest.approx(0.5)
    assert found.ci95 == (pytest.approx(0.5), pytest.approx(0.5))
    with pytest.raises(ValueError, match="can't be paired"):
        ratio([[1.0]], [[1.0, 2.0]], seed=0)


def test_fewer_than_five_sessions_give_a_ratio_and_no_interval() -> None:
    few = ratio([[1.0, 2.0]] * 4, [[2.0, 4.0]] * 4, seed=0)
    assert (few.median, few.ci95, few.reason) == (0.5, None, "4 sessions are too few for an interval")
    assert ratio([[1.0]] * 5, [[2.0]] * 5, seed=0).ci95 == (0.5, 0.5)


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
        assert len(model.time_to_first_token_ms.samples) == 5
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
    spec = BenchSpec(attention_backend="PA", prompt_tokens=16, output_tokens=2, pairs=5, warmup=1, limits=False)
    report = bench({"int4": finished_run.ir("int4")}, spec, list(range(2, 18)))
    assert report.conditions["prefix_caching"] is False
    assert report.models["int4"].time_to_first_token_ms.median > 0


def test_every_order_comes_equally_often_whatever_a_session_takes_of_them() -> None:
    taken = Counter(islice(orders(dict.fromkeys("abc"), seed=0), 60))
    assert len(taken) == 6
    assert set(taken.values()) == {10}
    positions = Counter(order.index("e") for order in islice(orders(dict.fromkeys("abcde"), seed=0), 1000))
    assert min(positions.values()) > 150


def test_no_further_session_is_begun_once_the_ratios_are_known(finished_run, monkeypatch) -> None:
    monkeypatch.setattr(sessions, "FEWEST_BEFORE_STOPPING", 5)
    models = {name: finished_run.ir(name) for name in ("plain", "int4")}
    wanted = SHORT.model_copy(update={"sessions": 6, "pairs": 6, "precision": 1e9})  # met however noisy the machine is
    coarse = bench(models, wanted, PROMPT)
    assert (coarse.conditions["sessions"], coarse.conditions["ended_by"]) == (5, {"SDPA": "precision"})
    assert len(coarse.models["int4"].time_to_first_token_ms.samples) == 5
    exact = bench(models, wanted.model_copy(update={"precision": 0.0}), PROMPT)
    assert (exact.conditions["sessions"], exact.conditions["ended_by"]) == (6, {"SDPA": "pairs"})


def test_a_benchmark_whose_time_is_up_at_once_has_five_sessions_of_one_round_and_so_an_interval(finished_run) -> None:
    models = {name: finished_run.ir(name) for name in ("plain", "int4")}
    hurried = bench(models, SHORT.model_copy(update={"sessions": 8, "pairs": 32, "time_limit_s": 1e-9}), PROMPT)
    found = {name: hurried.conditions[name] for name in ("sessions", "pairs", "ended_by")}
    assert found == {"sessions": 5, "pairs": 5, "ended_by": {"SDPA": "time_limit_s"}}
    assert hurried.ratios["int4/plain"].time_per_output_token.ci95


@pytest.mark.parametrize(
    ("limit", "measured"), [(40, (5, 1)), (90, (5, 4)), (102, (6, 4)), (118, (6, 4)), (119, (7, 4)), (1e6, (32, 4))]
)
def test_no_session_is_begun_that_would_end_after_the_time_limit(finished_run, monkeypatch, limit, measured) -> None:
    clock = [0.0]

    def load(*_: object) -> dict:
        clock[0] += 2
        return {}

    def run_round(*_: object) -> dict:
        clock[0] += 3
        return {"int4": rounds.Round(**dict.fromkeys(rounds.Round.__slots__, 1.0))}

    monkeypatch.setattr("ovexport.bench.sessions.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(sessions, "load_models", lambda *given: given[-1].update(int4=1.0) or load())
    monkeypatch.setattr(sessions, "run_round", run_round)
    candidates = {"int4": sessions.Candidate(ir=finished_run.ir("int4"), adapter=None)}
    timed, _ = sessions.measure(candidates, BenchSpec(prompt_tokens=16), "SDPA", PROMPT, limit, lambda _: None)
    found = next(iter(timed.values()))["int4"].rounds
    assert (len(found), len(found[0])) == measured
    assert clock[0] <= max(limit, 5 * 8)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_a_model_with_a_runtime_adapter_is_measured_beside_the_one_that_absorbed_it(
    finished_run, adapter_file, mode
) -> None:
    models = {"int4": finished_run.ir("int4"), "beside": finished_run.ir("plain")}
    adapter = RuntimeAdapter(path=adapter_file, mode=mode, scale=100.0)
    report = bench(models, SHORT, PROMPT, adapters={"beside": adapter})
    tuned = [layer for layer in finished_run.checkpoint.manifest.packed if layer.rank]
    assert report.conditions["adapters"] == {"beside": {"mode": mode, "scale": 100.0, "layers": len(tuned)}}
    measured = report.models["beside"]
    assert measured.weight_bytes == models["beside"].weight_bytes + adapter_file.stat().st_size
    assert measured.time_per_output_token_ms.median > 0
    assert "beside/int4" in report.ratios


def test_an_adapter_that_misses_a_layer_of_the_model_is_refused(finished_run, adapter_file) -> None:
    def misspelt(name: str, value: NDArray) -> tuple[str, NDArray]:
        return name.replace("layers.1.mlp.up_proj", "layers.1.mlp.upper_proj"), value

    adapter = RuntimeAdapter(path=rewritten(adapter_file, misspelt), mode="static", scale=100.0)
    with pytest.raises(UnsupportedModelError, match=r"1 of its 14 layers are not in .*upper_proj"):
        bench({"beside": finished_run.ir("plain")}, SHORT, PROMPT, adapters={"beside": adapter})


def test_an_adapter_that_changes_nothing_is_refused(finished_run, adapter_file) -> None:
    adapter = RuntimeAdapter(path=rewritten(adapter_file, lambda name, value: (name, 0 * value)), mode="dynamic")
    with pytest.raises(UnsupportedModelError, match="changes nothing"):
        bench({"beside": finished_run.ir("plain")}, SHORT, PROMPT, adapters={"beside": adapter})


def test_a_saved_adapter_holds_the_ranks_in_use_and_gives_the_tuned_update(finished_run, adapter_file) -> None:
    saved, kept = TensorFile(adapter_file), finished_run.checkpoint.adapters
    name = "model.layers.0.mlp.down_proj"
    ours = kept[f"{name}.weight.lora_B"] @ kept[f"{name}.weight.lora_A"]
    theirs = saved[f"base_model.model.{name}.lora_B.weight"].astype(np.float32) @ saved[
        f"base_model.model.{name}.lora_A.weight"
    ].astype(np.float32)
    np.testing.assert_allclose(theirs, ours, atol=np.abs(ours).max() / 100)


def test_a_batch_reports_its_tokens_over_the_seconds_of_an_outside_clock(finished_run, monkeypatch) -> None:
    seconds, tokens = [], []

    def clocked(*arguments, **options):
        begun = time.perf_counter()
        result = loading.generate(*arguments, **options)
        seconds.append(time.perf_counter() - begun)
        tokens.append(sum(len(row) for row in result.tokens))
        return result

    monkeypatch.setattr(rounds, "generate", clocked)
    spec = BenchSpec(prompt_tokens=16, output_tokens=12, batch_size=4, pairs=10, sessions=1, memory=False, limits=False)
    model = bench({"int4": finished_run.ir("int4")}, spec, PROMPT).models["int4"]
    assert set(tokens) == {48}
    median = float(np.median(seconds[1:]))
    assert model.throughput_tokens_per_s == pytest.approx(48 / median, rel=0.03)
    assert len(model.inter_token_latency_ms.samples) == 10 * 11
    step = model.time_per_output_token_ms.median
    assert 11 * step < 1000 * median


@pytest.fixture(scope="module")
def grid(finished_run) -> BenchmarkReport:
    models = {name: finished_run.ir(name) for name in ("bf16", "int4")}
    spec = BenchSpec(
        prompt_tokens=(8, 16), output_tokens=3, batch_size=(1, 2), pairs=5, sessions=1, attention_backend=("SDPA", "PA")
    )
    return bench(models, spec, PROMPT)


def test_a_grid_has_every_combination_and_its_first_point_is_the_reports(grid: BenchmarkReport) -> None:
    points = [(one.attention_backend, one.batch_size, one.prompt_tokens) for one in grid.grid]
    assert points == [(backend, batch, length) for backend in ("SDPA", "PA") for batch in (1, 2) for length in (8, 16)]
    first = grid.grid[0].models["int4"]
    assert grid.models["int4"].time_to_first_token_ms == first.time_to_first_token_ms
    assert grid.ratios == grid.grid[0].ratios
    assert (grid.conditions["prompt_tokens"], grid.conditions["batch_size"]) == (8, 1)


def test_memory_is_split_and_the_limit_counts_the_bytes_that_a_token_reads(grid: BenchmarkReport) -> None:
    bf16, int4 = grid.models["bf16"], grid.models["int4"]
    for model in (bf16, int4):
        for phase in (model.load_memory, model.generation_memory):
            assert 0 < phase.peak_anonymous_bytes < phase.peak_rss_bytes <= model.peak_rss_bytes
        assert model.limit.share_of_bandwidth > 0
        assert model.limit.time_per_output_token_ms == pytest.approx(
            1000 * model.limit.bytes_per_token / grid.machine.bandwidth_bytes_per_s
        )
    assert int4.limit.bytes_per_token < 0.6 * bf16.limit.bytes_per_token
    assert int4.limit.operations_first_token == bf16.limit.operations_first_token
    linear = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    expected = 2 * (8 * linear + 64 * 2048 + 2 * 64 * 8**2)
    assert bf16.limit.operations_first_token == expected


@pytest.mark.parametrize(
    ("interval", "told"),
    [
        ((0.9, 1.1), "slower than its bytes promise"),
        ((0.01, 0.02), "faster than its bytes promise"),
        ((0.01, 20.0), "the interval holds what its bytes promise"),
    ],
)
def test_an_interval_decides_whether_a_model_is_as_fast_as_its_bytes_promise(
    grid: BenchmarkReport, interval: tuple[float, float], told: str
) -> None:
    ratios = grid.ratios["int4/bf16"]
    ratio = ratios.time_per_output_token.model_copy(update={"ci95": interval})
    measured = grid.model_copy(
        update={"ratios": {"int4/bf16": ratios.model_copy(update={"time_per_output_token": ratio})}}
    )
    (sentence,) = promises(measured)
    assert sentence.endswith(f": {told}.")


def test_ratios_without_an_interval_are_shown_as_such_everywhere(grid: BenchmarkReport) -> None:
    ratios = grid.ratios["int4/bf16"]
    assert (ratios.time_per_output_token.ci95, ratios.time_to_first_token.ci95) == (None, None)
    assert "too few sessions to judge that (1 session is too few for an interval)" in " ".join(promises(grid))
    findings = Findings(None, None, grid)
    _, speed = headlines(findings)
    assert "tie" not in speed.meaning
    assert speed.detail.startswith("1 session is too few for an interval; first token")
    shown = f"{ratios.time_per_output_token.median:.2f}"
    rows = {row.figure: row.values for row in comparison(findings)[1]}
    assert ["–", shown] in [list(values) for values in rows.values()]
    assert f" {ratios.time_per_output_token.median:.3f} |" in as_markdown(grid)
    assert plots.grid(grid)
    assert plots.latencies(grid)
    assert course(grid) == "5 interleaved rounds in 1 session: all rounds were done (SDPA); all rounds were done (PA)"


def test_reports_come_in_the_shapes_of_other_tools(grid: BenchmarkReport, finished_run) -> None:
    lines = list(csv.DictReader(io.StringIO(as_csv(grid))))
    assert len(lines) == 2 * len(grid.grid)
    assert float(lines[1]["time_to_first_token_ms"]) == grid.models["int4"].time_to_first_token_ms.median
    assert as_markdown(grid).count("| int4/bf16 |") == len(grid.grid)
    with pytest.raises(ValueError, match="of one model at one point"):
        as_llm_bench(grid)
    report = bench({"int4": finished_run.ir("int4")}, SHORT, PROMPT)
    document = as_llm_bench(report)
    assert set(document) == {"metadata", "perfdata"}
    results = document["perfdata"]["results"]
    assert [one["iteration"] for one in results] == list(range(7))
    latencies = [one["first_latency"] for one in results[1:]]
    assert latencies == [round(value, 5) for value in report.models["int4"].time_to_first_token_ms.samples]
    assert document["perfdata"]["results_averaged"]["first_latency"] == pytest.approx(np.mean(latencies), abs=1e-5)


LLM_BENCH_TYPES = {
    "iteration": int,
    "input_size": int,
    "infer_count": int,
    "output_size": int,
    "generation_time": float,
    "latency": float,
    "first_latency": float,
    "second_avg_latency": float,
    "first_infer_latency": float,
    "second_infer_avg_latency": float,
    "tokenization_time": float,
    "detokenization_time": float,
    "prompt_idx": int,
    "result_md5": list,
    "start": str,
    "end": str,
    "second_token_throughput": float,
}
LLM_BENCH_MEANS = (
    "generation_time",
    "latency",
    "first_latency",
    "second_avg_latency",
    "first_infer_latency",
    "second_infer_avg_latency",
    "tokenization_time",
    "detokenization_time",
)


def test_llm_benchs_json_has_its_fields_and_types_its_warm_up_and_the_weights_precision(finished_run) -> None:
    spec = SHORT.model_copy(update={"batch_size": (2,), "output_tokens": (4,), "memory": True})
    report = bench({"int4": finished_run.ir("int4")}, spec, PROMPT)
    document = json.loads(json.dumps(as_llm_bench(report)))
    assert list(document["metadata"]) == ["model", "framework", "device", "precision", "num_beams", "batch_size"]
    assert (document["metadata"]["precision"], document["metadata"]["batch_size"]) == ("INT4_ASYM", 2)
    warmup, *results = document["perfdata"]["results"]
    assert isinstance(warmup.pop("max_rss_mem"), float)
    for one in (warmup, *results):
        assert {name: type(value) for name, value in one.items()} == LLM_BENCH_TYPES
        assert (one["input_size"], one["infer_count"], one["output_size"]) == (32, 4, 8)
        assert datetime.fromisoformat(one["start"]) < datetime.fromisoformat(one["end"])
        assert [len(digest) for digest in one["result_md5"]] == [32, 32]
        assert one["first_infer_latency"] <= one["first_latency"] < 1000 * one["generation_time"]
        assert one["second_token_throughput"] == pytest.approx(2000 / one["second_avg_latency"], rel=1e-3)
    averaged = document["perfdata"]["results_averaged"]
    assert list(averaged) == [*LLM_BENCH_MEANS, "second_token_throughput"]
    for name in LLM_BENCH_MEANS:
        assert averaged[name] == round(sum(one[name] for one in results) / len(results), 5)
    assert averaged["second_token_throughput"] == round(2000 / averaged["second_avg_latency"], 5)
    memory = {name: value for name, value in document["perfdata"].items() if "_mem" in name}
    assert isinstance(memory.pop("compile_max_rss_mem(MiB)"), float)
    assert set(memory.values()) == {""}
    assert len(memory) == 5
    baseline = bench({"bf16": finished_run.ir("bf16")}, SHORT, PROMPT)
    assert as_llm_bench(baseline)["metadata"]["precision"] == "BF16"


def test_the_md5_is_of_the_answer_that_the_pipeline_itself_gives(finished_run) -> None:
    report = bench({"int4": finished_run.ir("int4")}, SHORT, PROMPT)
    pipeline = openvino_genai.LLMPipeline(str(finished_run.ir("int4").path), "CPU", ATTENTION_BACKEND="SDPA")
    tokens = loading.generate(pipeline, np.array([PROMPT]), 2).tokens[0]
    text = pipeline.get_tokenizer().decode(np.array([tokens]))[0]
    digest = hashlib.md5(text.encode()).hexdigest()
    assert {one.result_md5 for one in report.models["int4"].generations} == {(digest,)}


def test_a_model_against_itself_is_as_fast_though_the_first_of_a_round_is_slower(finished_run, monkeypatch) -> None:
    """The times are made up, since a busy machine has none to rely on: they drift, and the first model is cold."""
    drift = count(100.0)
    texts = rounds.Texts(encoding_ms=None, decoding_ms=None, md5=())

    def run_round(pipelines: object, order: Sequence[str], *_: object) -> dict[str, rounds.Round]:
        now, level = datetime.now(UTC), next(drift)
        took = {name: level * (1.0 if place else 1.2) for place, name in enumerate(order)}
        return {
            name: rounds.Round(
                began=now,
                ended=now,
                first_token_ms=ms,
                intervals_ms=(ms, ms),
                whole_ms=3 * ms,
                inferences_ms=(ms, ms, ms),
                texts=texts,
            )
            for name, ms in took.items()
        }

    monkeypatch.setattr(sessions, "run_round", run_round)
    same = {name: finished_run.ir("int4") for name in ("int4", "same")}
    spec = SHORT.model_copy(update={"pairs": 24, "sessions": 6, "memory": False})
    ratios = bench(same, spec, PROMPT).ratios["same/int4"]
    for one in (ratios.time_to_first_token, ratios.time_per_output_token):
        assert one.ci95[0] <= 1.0 <= one.ci95[1]
        assert one.median == pytest.approx(1.0, abs=0.02)


def test_settings_that_the_device_does_not_know_are_refused(finished_run) -> None:
    with pytest.raises(UnsupportedModelError, match="can't compile it with these settings"):
        bench({"int4": finished_run.ir("int4")}, SHORT.model_copy(update={"threads": -7}), PROMPT)
