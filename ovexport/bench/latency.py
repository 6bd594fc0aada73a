"""Time to first token and time per output token, model after model in each round, and their ratios pair by pair."""

import gc
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

_MOST_PERMUTED = 4


@dataclass(slots=True)
class _Latencies:
    """A model's figures in milliseconds: load times per session, and per session one entry for each round."""

    load: list[float] = field(default_factory=list)
    first_token: list[list[float]] = field(default_factory=list)
    output_token: list[list[float]] = field(default_factory=list)


def bench(
    models: Mapping[str, IR], spec: BenchSpec, prompt: Sequence[int], *, listener: Listener = silent
) -> BenchmarkReport:
    """Measure the models; every two of them get a ratio, the one later in `models` over the earlier.

    Args:
        prompt: token ids, at least `spec.prompt_tokens` of them.

    Raises:
        DataError: the prompt is too short.
        RecipeError: the device is not there.
        ArtifactError: an IR is missing or unreadable.
        UnsupportedModelError: openvino-genai can't load an IR.
    """
    if len(prompt) < spec.prompt_tokens:
        raise DataError(f"bench.prompt_tokens={spec.prompt_tokens}: the prompt has {len(prompt)} tokens; lower it")
    check_device(spec.device)
    settings = runtime_settings(spec)
    runtime = {name: read_back(ir, spec) for name, ir in models.items()}
    memory = {name: peak_rss_bytes(ir, settings, spec, prompt) for name, ir in models.items()}
    conditions = {
        "prompt_tokens": spec.prompt_tokens,
        "output_tokens": spec.output_tokens,
        "pairs": spec.pairs,
        "sessions": spec.sessions,
        "warmup": spec.warmup,
        "device": spec.device,
        "attention_backend": spec.attention_backend,
        "prefix_caching": False,
        "device_name": ov.Core().get_property(spec.device, "FULL_DEVICE_NAME"),
        "runtime": runtime,
    }
    timed = _measure_sessions(models, spec, settings, prompt, listener)
    return BenchmarkReport(
        models={
            name: ModelBenchmark(
                time_to_first_token_ms=_samples(one.first_token),
                time_per_output_token_ms=_samples(one.output_token),
                throughput_tokens_per_s=1000 / _samples(one.output_token).median,
                load_time_ms=float(np.median(one.load)),
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
            for earlier, later in itertools.combinations(timed, 2)
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


def ratio(
    candidate: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], seed: int, resamples: int = 5000
) -> Ratio:
    """Median of the pairwise ratios and its 95 % interval.

    The bootstrap draws sessions first and then pairs within them: where a model comes to lie in memory moves all the
    pairs of a session together, so pairs alone would promise too much.

    Args:
        candidate, reference: samples by session.

    Raises:
        ValueError: the numbers of sessions or of samples differ.
    """
    if [len(session) for session in candidate] != [len(session) for session in reference]:
        raise ValueError("sessions of different lengths can't be paired")
    ratios = [np.asarray(ours) / np.asarray(theirs) for ours, theirs in zip(candidate, reference, strict=True)]
    generator = np.random.default_rng(seed)
    medians = []
    for _ in range(resamples):
        sessions = [ratios[index] for index in generator.integers(0, len(ratios), len(ratios))]
        drawn = [session[generator.integers(0, len(session), len(session))] for session in sessions]
        medians.append(np.median(np.concatenate(drawn)))
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(median=float(np.median(np.concatenate(ratios))), ci95=(float(low), float(high)))


def _measure_sessions(
    models: Mapping[str, IR], spec: BenchSpec, settings: Mapping[str, Any], prompt: Sequence[int], listener: Listener
) -> dict[str, _Latencies]:
    """Load all models anew for each session and run them round by round, in every order equally often."""
    tokens = np.asarray(prompt[: spec.prompt_tokens], dtype=np.int64).reshape(1, -1)
    timed = {name: _Latencies() for name in models}
    orders = itertools.cycle(itertools.permutations(models) if len(models) <= _MOST_PERMUTED else [tuple(models)])
    rounds = math.ceil(spec.pairs / spec.sessions)
    for session in range(spec.sessions):
        pipelines = {}
        for name in next(orders):
            pipelines[name], load_ms = _load(models[name], settings, spec)
            timed[name].load.append(load_ms)
            timed[name].first_token.append([])
            timed[name].output_token.append([])
        for index in range(-spec.warmup, rounds):
            for name in next(orders):
                first, following = _measure(pipelines[name], tokens, spec)
                if index >= 0:
                    timed[name].first_token[-1].append(first)
                    timed[name].output_token[-1].append(following)
            done = session * (rounds + spec.warmup) + index + spec.warmup + 1
            listener(Progress(task="bench", done=done, total=spec.sessions * (rounds + spec.warmup)))
        del pipelines
        gc.collect()
    return timed


def _load(ir: IR, settings: Mapping[str, Any], spec: BenchSpec) -> tuple[openvino_genai.LLMPipeline, float]:
    """The pipeline, and its load time in milliseconds."""
    try:
        pipeline = openvino_genai.LLMPipeline(str(ir.require().path), spec.device, **settings)
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        raise UnsupportedModelError(f"{ir.path}: openvino-genai can't load it ({last.strip()})") from error
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = 2
    config.ignore_eos = True
    loaded = pipeline.generate(openvino_genai.TokenizedInputs(*_tensors(np.zeros((1, 1), np.int64))), config)
    return pipeline, float(loaded.perf_metrics.get_load_time())


def _measure(pipeline: openvino_genai.LLMPipeline, tokens: NDArray[np.int64], spec: BenchSpec) -> tuple[float, float]:
    """Time to the first token and per following token, in milliseconds."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = spec.output_tokens
    config.min_new_tokens = spec.output_tokens
    config.ignore_eos = True
    config.do_sample = False
    metrics = pipeline.generate(openvino_genai.TokenizedInputs(*_tensors(tokens)), config).perf_metrics
    return float(metrics.get_ttft().mean), float(metrics.get_tpot().mean)


def _tensors(tokens: NDArray[np.int64]) -> tuple[ov.Tensor, ov.Tensor]:
    return ov.Tensor(tokens), ov.Tensor(np.ones_like(tokens))


def _samples(sessions: Sequence[Sequence[float]]) -> Samples:
    values = [value for session in sessions for value in session]
    median, p90, p99 = np.percentile(values, [50, 90, 99])
    return Samples(median=float(median), p90=float(p90), p99=float(p99), samples=tuple(values))
