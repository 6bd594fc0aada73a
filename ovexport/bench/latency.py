"""Time to first token and time per output token, model after model in each round, and their ratios pair by pair.

Where a model's weights come to lie in memory shifts all its rounds together by several percent, until it is loaded
anew: another session is worth more than more rounds of the same one, and sessions are what the bootstrap draws.
"""

import gc
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai
from numpy.typing import NDArray

from ovexport.artifacts import IR
from ovexport.bench.adapters import require_applied
from ovexport.bench.loading import RuntimeAdapter, generate, load_pipeline
from ovexport.bench.memory import peak_rss_bytes
from ovexport.errors import DataError
from ovexport.graph import read_graph
from ovexport.progress import Listener, Progress, silent
from ovexport.recipe import BenchSpec
from ovexport.reports import BenchmarkReport, LatencyRatios, ModelBenchmark, Ratio, Samples
from ovexport.runtime import check_device, properties
from ovexport.versions import stack_versions

_MOST_PERMUTED = 4
_LEAST_SESSIONS = 8
_RESAMPLES_WHILE_MEASURING = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A model and what is loaded with it."""

    ir: IR
    adapter: RuntimeAdapter | None

    @property
    def weight_bytes(self) -> int:
        """Size of the weights on disk, the adapter's included."""
        return self.ir.weight_bytes + (self.adapter.path.stat().st_size if self.adapter else 0)


@dataclass(slots=True)
class _Latencies:
    """A model's figures in milliseconds: load times per session, and per session one entry for each round."""

    load: list[float] = field(default_factory=list)
    first_token: list[list[float]] = field(default_factory=list)
    output_token: list[list[float]] = field(default_factory=list)


def bench(
    models: Mapping[str, IR],
    spec: BenchSpec,
    prompt: Sequence[int],
    *,
    adapters: Mapping[str, RuntimeAdapter] | None = None,
    listener: Listener = silent,
) -> BenchmarkReport:
    """Measure the models; every two of them get a ratio, the one later in `models` over the earlier.

    Args:
        prompt: token ids, at least `spec.prompt_tokens` of them.
        adapters: by model, a LoRA adapter that it runs with; it is applied, or refused.

    Raises:
        DataError: the prompt is too short.
        RecipeError: the device is not there.
        ArtifactError: an IR is missing or unreadable.
        UnsupportedModelError: openvino-genai can't load an IR, or does not apply an adapter.
    """
    if len(prompt) < spec.prompt_tokens:
        raise DataError(f"bench.prompt_tokens={spec.prompt_tokens}: the prompt has {len(prompt)} tokens; lower it")
    check_device(spec.device)
    adapters = adapters or {}
    candidates = {name: _Candidate(ir=ir, adapter=adapters.get(name)) for name, ir in models.items()}
    conditions = {
        "prompt_tokens": spec.prompt_tokens,
        "output_tokens": spec.output_tokens,
        "warmup": spec.warmup,
        "device": spec.device,
        "attention_backend": spec.attention_backend,
        "prefix_caching": False,
        "device_name": ov.Core().get_property(spec.device, "FULL_DEVICE_NAME"),
        "runtime": {name: read_back(ir, spec) for name, ir in models.items()},
        "adapters": {
            name: {
                "mode": adapter.mode,
                "scale": adapter.scale,
                "layers": require_applied(models[name], adapter, spec, prompt),
            }
            for name, adapter in adapters.items()
        },
    }
    memory = {name: peak_rss_bytes(one.ir, spec, prompt, one.adapter) for name, one in candidates.items()}
    timed = _measure_sessions(candidates, spec, prompt, listener)
    first_token = next(iter(timed.values())).first_token
    counts = {"sessions": len(first_token), "pairs": sum(len(session) for session in first_token)}
    return BenchmarkReport(
        models={name: _model_benchmark(one, candidates[name], memory[name]) for name, one in timed.items()},
        ratios=_ratios(timed, spec.seed),
        conditions=conditions | counts,
        versions=stack_versions(),
    )


def _model_benchmark(timed: _Latencies, candidate: _Candidate, peak: int | None) -> ModelBenchmark:
    output_token = _samples(timed.output_token)
    return ModelBenchmark(
        time_to_first_token_ms=_samples(timed.first_token),
        time_per_output_token_ms=output_token,
        throughput_tokens_per_s=1000 / output_token.median,
        load_time_ms=float(np.median(timed.load)),
        peak_rss_bytes=peak,
        weight_bytes=candidate.weight_bytes,
        reason=None if peak is not None else "peak memory is read from /proc, which is not here",
    )


def read_back(ir: IR, spec: BenchSpec) -> dict[str, str]:
    """The runtime properties in force when the IR is compiled with the benchmark's settings."""
    hint = {} if spec.inference_precision == "default" else {"INFERENCE_PRECISION_HINT": spec.inference_precision}
    return properties(ov.Core().compile_model(read_graph(ir), spec.device, hint))


def ratio(
    candidate: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], seed: int, resamples: int = 5000
) -> Ratio:
    """Median of the pairwise ratios and its 95 % interval.

    The bootstrap draws sessions first and then pairs within them: pairs alone would promise too much, as those of a
    session move together. Drawing at both levels is on the careful side (Davison and Hinkley, Bootstrap Methods and
    their Application, 3.8).

    Args:
        candidate, reference: samples by session, (sessions, rounds).

    Raises:
        ValueError: the numbers of sessions or of samples differ.
    """
    if {len(session) for session in (*candidate, *reference)} != {len(candidate[0])} or len(candidate) != len(
        reference
    ):
        raise ValueError("sessions of different lengths can't be paired")
    ratios = np.asarray(candidate) / np.asarray(reference)
    sessions, rounds = ratios.shape
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, sessions, (resamples, sessions, 1))
    pairs = generator.integers(0, rounds, (resamples, sessions, rounds))
    medians = np.median(ratios[drawn, pairs].reshape(resamples, -1), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(median=float(np.median(ratios)), ci95=(float(low), float(high)))


def _ratios(timed: Mapping[str, _Latencies], seed: int, resamples: int = 5000) -> dict[str, LatencyRatios]:
    """The ratios of every two models, the later one over the earlier."""
    return {
        f"{later}/{earlier}": LatencyRatios(
            time_to_first_token=ratio(timed[later].first_token, timed[earlier].first_token, seed, resamples),
            time_per_output_token=ratio(timed[later].output_token, timed[earlier].output_token, seed, resamples),
        )
        for earlier, later in itertools.combinations(timed, 2)
    }


def _measure_sessions(
    candidates: Mapping[str, _Candidate], spec: BenchSpec, prompt: Sequence[int], listener: Listener
) -> dict[str, _Latencies]:
    """Measure session after session until all are done or every ratio is known as precisely as asked.

    The intervals' width alone is looked at, never where they lie, so that stopping early favours no model (Chow and
    Robbins, On the asymptotic theory of fixed-width sequential confidence intervals, 1965).
    """
    tokens = np.asarray(prompt[: spec.prompt_tokens], dtype=np.int64).reshape(1, -1)
    timed = {name: _Latencies() for name in candidates}
    sessions = min(spec.sessions, spec.pairs)
    rounds = math.ceil(spec.pairs / sessions)
    load_orders, run_orders = orders(candidates, spec.seed), orders(candidates, spec.seed)
    for session in range(sessions):
        pipelines = _load(candidates, next(load_orders), spec, timed)
        for _ in range(spec.warmup):
            _run_round(pipelines, tuple(candidates), tokens, spec)
        for index in range(rounds):
            for name, (first, following) in _run_round(pipelines, next(run_orders), tokens, spec).items():
                timed[name].first_token[-1].append(first)
                timed[name].output_token[-1].append(following)
            listener(Progress(task="bench", done=session * rounds + index + 1, total=sessions * rounds))
        del pipelines
        gc.collect()
        if session + 1 >= _LEAST_SESSIONS and _widest(timed, spec.seed) <= spec.precision:
            listener(Progress(task="bench", done=sessions * rounds, total=sessions * rounds))
            break
    return timed


def orders(names: Mapping[str, Any], seed: int) -> Iterator[tuple[str, ...]]:
    """Orders without end: each as often as any other, or drawn at random where there are too many of them."""
    if len(names) <= _MOST_PERMUTED:
        yield from itertools.cycle(itertools.permutations(names))
    generator = np.random.default_rng(seed)
    while True:
        yield tuple(generator.permutation(list(names)).tolist())


def _widest(timed: Mapping[str, _Latencies], seed: int) -> float:
    """Half the width of the widest interval, as a share of its median."""
    ratios = _ratios(timed, seed, _RESAMPLES_WHILE_MEASURING).values()
    both = [figure for one in ratios for figure in (one.time_to_first_token, one.time_per_output_token)]
    return max(((one.ci95[1] - one.ci95[0]) / 2 / one.median for one in both), default=0.0)


def _load(
    candidates: Mapping[str, _Candidate], order: Sequence[str], spec: BenchSpec, timed: Mapping[str, _Latencies]
) -> dict[str, openvino_genai.LLMPipeline]:
    """The models' pipelines, their load times noted, and a new session begun."""
    pipelines = {}
    for name in order:
        pipelines[name] = load_pipeline(candidates[name].ir, spec, candidates[name].adapter)
        loaded = generate(pipelines[name], np.zeros((1, 1), np.int64), 2)
        timed[name].load.append(float(loaded.perf_metrics.get_load_time()))
        timed[name].first_token.append([])
        timed[name].output_token.append([])
    return pipelines


def _run_round(
    pipelines: Mapping[str, openvino_genai.LLMPipeline],
    order: Sequence[str],
    tokens: NDArray[np.int64],
    spec: BenchSpec,
) -> dict[str, tuple[float, float]]:
    """By model, the time to the first token and per following token, in milliseconds."""
    found = {}
    for name in order:
        metrics = generate(pipelines[name], tokens, spec.output_tokens).perf_metrics
        found[name] = float(metrics.get_ttft().mean), float(metrics.get_tpot().mean)
    return found


def _samples(sessions: Sequence[Sequence[float]]) -> Samples:
    values = [value for session in sessions for value in session]
    median, p90, p99 = np.percentile(values, [50, 90, 99])
    return Samples(median=float(median), p90=float(p90), p99=float(p99), samples=tuple(values))
