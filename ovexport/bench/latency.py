"""Time to first token and time per output token, model after model in each round, and their ratios pair by pair."""

import gc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai
from numpy.typing import NDArray

from ovexport.artifacts import IR
from ovexport.bench.memory import peak_rss_bytes
from ovexport.errors import DataError, UnsupportedModelError
from ovexport.graph import read_graph
from ovexport.progress import Listener, Progress, silent
from ovexport.recipe import BenchSpec
from ovexport.reports import BenchmarkReport, LatencyRatios, ModelBenchmark, Ratio, Samples
from ovexport.runtime import check_device, properties
from ovexport.versions import stack_versions


@dataclass(slots=True)
class _Timed:
    """A loaded pipeline and its latencies in milliseconds, one entry per round."""

    pipeline: openvino_genai.LLMPipeline
    load_time_ms: float
    first_token: list[float] = field(default_factory=list)
    output_token: list[float] = field(default_factory=list)


def bench(
    models: Mapping[str, IR], spec: BenchSpec, prompt: Sequence[int], *, listener: Listener = silent
) -> BenchmarkReport:
    """Measure the models; every two of them get a ratio, the one later in `models` over the earlier.

    Args:
        prompt: token ids, at least `spec.prompt_tokens` of them.

    Raises:
        DataError: the prompt is too short.
        RecipeError: the device is not there.
        UnsupportedModelError: openvino-genai can't load an IR.
    """
    if len(prompt) < spec.prompt_tokens:
        raise DataError(f"bench.prompt_tokens={spec.prompt_tokens}: the prompt has {len(prompt)} tokens; lower it")
    check_device(spec.device)
    settings = runtime_settings(spec)
    memory = {name: peak_rss_bytes(ir, settings, spec, prompt) for name, ir in models.items()}
    conditions = {
        "prompt_tokens": spec.prompt_tokens,
        "output_tokens": spec.output_tokens,
        "pairs": spec.pairs,
        "warmup": spec.warmup,
        "device": spec.device,
        "attention_backend": spec.attention_backend,
        "prefix_caching": False,
        "device_name": ov.Core().get_property(spec.device, "FULL_DEVICE_NAME"),
        "runtime": {name: read_back(ir, spec) for name, ir in models.items()},
    }
    timed = {name: _load(ir, settings, spec) for name, ir in models.items()}
    tokens = np.asarray(prompt[: spec.prompt_tokens], dtype=np.int64).reshape(1, -1)
    for index in range(-spec.warmup, spec.pairs):
        order = list(timed)
        turn = index % len(order)  # who goes first changes, so that no model always runs on another's warm caches
        for name in order[turn:] + order[:turn]:
            _measure(timed[name], tokens, spec, keep=index >= 0)
        listener(Progress(task="bench", done=index + spec.warmup + 1, total=spec.pairs + spec.warmup))
    return BenchmarkReport(
        models={
            name: ModelBenchmark(
                time_to_first_token_ms=_samples(one.first_token),
                time_per_output_token_ms=_samples(one.output_token),
                throughput_tokens_per_s=1000 / float(np.median(one.output_token)),
                load_time_ms=one.load_time_ms,
                peak_rss_bytes=memory[name],
                weight_bytes=models[name].weight_bytes,
                reason=None if memory[name] is not None else "peak memory is read from /proc, which is not here",
            )
            for name, one in timed.items()
        },
        ratios={
            f"{later}/{earlier}": LatencyRatios(
                time_to_first_token=ratio(timed[later].first_token, timed[earlier].first_token, spec.seed),
                time_per_output_token=ratio(timed[later].output_token, timed[earlier].output_token, spec.seed),
            )
            for earlier, later in combinations(timed, 2)
        },
        conditions=conditions,
        versions=stack_versions(),
    )


def runtime_settings(spec: BenchSpec) -> dict[str, Any]:
    """What every pipeline of the comparison is loaded with."""
    settings: dict[str, Any] = {"ATTENTION_BACKEND": spec.attention_backend}
    if spec.inference_precision != "default":
        settings["INFERENCE_PRECISION_HINT"] = spec.inference_precision
    if spec.attention_backend == "PA":
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = sys.maxsize
        settings["scheduler_config"] = scheduler
    return settings


def read_back(ir: IR, spec: BenchSpec) -> dict[str, str]:
    """The runtime properties in force when the IR is compiled with the benchmark's settings."""
    hint = {} if spec.inference_precision == "default" else {"INFERENCE_PRECISION_HINT": spec.inference_precision}
    return properties(ov.Core().compile_model(read_graph(ir), spec.device, hint))


def ratio(candidate: Sequence[float], reference: Sequence[float], seed: int, resamples: int = 5000) -> Ratio:
    """Median of the pairwise ratios and its 95 % interval by bootstrap over the pairs.

    Raises:
        ValueError: the lengths differ.
    """
    if len(candidate) != len(reference):
        raise ValueError(f"{len(candidate)} and {len(reference)} samples can't be paired")
    ratios = np.asarray(candidate) / np.asarray(reference)
    chosen = np.random.default_rng(seed).integers(0, len(ratios), (resamples, len(ratios)))
    low, high = np.percentile(np.median(ratios[chosen], axis=1), [2.5, 97.5])
    return Ratio(median=float(np.median(ratios)), ci95=(float(low), float(high)))


def _load(ir: IR, settings: Mapping[str, Any], spec: BenchSpec) -> _Timed:
    gc.collect()
    try:
        pipeline = openvino_genai.LLMPipeline(str(ir.require().path), spec.device, **settings)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        raise UnsupportedModelError(f"{ir.path}: openvino-genai can't load it ({last.strip()})") from error
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = 2
    config.ignore_eos = True
    loaded = pipeline.generate(openvino_genai.TokenizedInputs(*_tensors(np.zeros((1, 1), np.int64))), config)
    return _Timed(pipeline=pipeline, load_time_ms=float(loaded.perf_metrics.get_load_time()))


def _measure(one: _Timed, tokens: NDArray[np.int64], spec: BenchSpec, *, keep: bool) -> None:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = spec.output_tokens
    config.min_new_tokens = spec.output_tokens
    config.ignore_eos = True
    config.do_sample = False
    metrics = one.pipeline.generate(openvino_genai.TokenizedInputs(*_tensors(tokens)), config).perf_metrics
    if keep:
        one.first_token.append(float(metrics.get_ttft().mean))
        one.output_token.append(float(metrics.get_tpot().mean))


def _tensors(tokens: NDArray[np.int64]) -> tuple[ov.Tensor, ov.Tensor]:
    return ov.Tensor(tokens), ov.Tensor(np.ones_like(tokens))


def _samples(values: Sequence[float]) -> Samples:
    median, p90, p99 = np.percentile(values, [50, 90, 99])
    return Samples(median=float(median), p90=float(p90), p99=float(p99), samples=tuple(values))
