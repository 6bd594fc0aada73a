"""Time to first token and time per output token, model after model in each round, and their ratios pair by pair.

Where a model's weights come to lie in memory shifts all its rounds together by several percent, until it is loaded
anew: another session is worth more than more rounds of the same one, and sessions are what the bootstrap draws.
"""

import gc
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import openvino as ov
import openvino_genai

from ovexport.artifacts import IR
from ovexport.bench.adapters import require_applied
from ovexport.bench.limits import Work, machine_limits, physical_limit, work_of
from ovexport.bench.loading import RuntimeAdapter, device_settings, generate, load_pipeline
from ovexport.bench.memory import Peaks, peak_memory
from ovexport.bench.rounds import Round, orders, prompts, ratio, run_round, samples
from ovexport.errors import DataError, UnsupportedModelError, last_line
from ovexport.graph import read_graph
from ovexport.identity import identify
from ovexport.progress import Listener, Progress, silent
from ovexport.recipe import Backend, BenchSpec, GridPoint
from ovexport.reports import (
    BenchmarkReport,
    LatencyRatios,
    MachineLimits,
    ModelBenchmark,
    PointBenchmark,
    Ratio,
)
from ovexport.runtime import check_device, properties
from ovexport.versions import stack_versions

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
    """A model's figures: load times in milliseconds per session, and per session one entry for each round."""

    load: list[float] = field(default_factory=list)
    rounds: list[list[Round]] = field(default_factory=list)

    def of(self, figure: str) -> list[list[float]]:
        """A figure by session and round."""
        return [[getattr(one, figure) for one in session] for session in self.rounds]


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
        prompt: token ids, at least the longest of `spec.prompt_tokens` of them.
        adapters: by model, a LoRA adapter that it runs with; it is applied, or refused.

    Raises:
        DataError: the prompt is too short.
        RecipeError: the device is not there.
        ArtifactError: an IR is missing or unreadable.
        UnsupportedModelError: openvino-genai can't load an IR, does not apply an adapter, or generates nothing.
    """
    if len(prompt) < max(spec.prompt_tokens):
        raise DataError(f"bench.prompt_tokens={max(spec.prompt_tokens)}: the prompt has {len(prompt)} tokens; lower it")
    check_device(spec.device)
    adapters = adapters or {}
    candidates = {name: _Candidate(ir=ir, adapter=adapters.get(name)) for name, ir in models.items()}
    runtime = {name: read_back(ir, spec) for name, ir in models.items()}
    applied = {
        name: {
            "mode": adapter.mode,
            "scale": adapter.scale,
            "layers": require_applied(models[name], adapter, spec, prompt),
        }
        for name, adapter in adapters.items()
    }
    memory = {
        name: peak_memory(one.ir, spec, prompt, one.adapter) if spec.memory else None
        for name, one in candidates.items()
    }
    machine = machine_limits(runtime.values()) if spec.limits and spec.device == "CPU" else None
    measured = {
        backend: _measure_sessions(candidates, spec, backend, prompt, listener)
        for backend in dict.fromkeys(spec.attention_backend)
    }
    timed = {point: measured[point.attention_backend][point] for point in spec.points}
    work = {name: work_of(ir) for name, ir in models.items()} if machine else {}
    grid = [_point(point, timed[point], candidates, machine, runtime, work, spec.seed) for point in spec.points]
    with_memory = {name: _with_memory(one, memory[name]) for name, one in grid[0].models.items()}
    grid[0] = grid[0].model_copy(update={"models": with_memory})
    first = next(iter(timed[spec.points[0]].values())).rounds
    return BenchmarkReport(
        models=grid[0].models,
        ratios=grid[0].ratios,
        grid=tuple(grid),
        machine=machine,
        conditions={
            "models": {name: identify(ir) for name, ir in models.items()},
            **spec.points[0]._asdict(),
            "warmup": spec.warmup,
            "device": spec.device,
            "prefix_caching": False,
            "device_name": ov.Core().get_property(spec.device, "FULL_DEVICE_NAME"),
            "pinned": {name: str(value) for name, value in device_settings(spec).items()},
            "runtime": runtime,
            "adapters": applied,
            "sessions": len(first),
            "pairs": sum(len(session) for session in first),
        },
        versions=stack_versions(),
    )


def _point(
    point: GridPoint,
    timed: Mapping[str, _Latencies],
    candidates: Mapping[str, _Candidate],
    machine: MachineLimits | None,
    runtime: Mapping[str, Mapping[str, str]],
    work: Mapping[str, Work],
    seed: int,
) -> PointBenchmark:
    """What was measured at a point of the grid, the memory aside."""
    models = {}
    for name, one in timed.items():
        whole = samples(one.of("whole_ms"))
        first_token, output_token = samples(one.of("first_token_ms")), samples(one.of("output_token_ms"))
        intervals = [value for session in one.rounds for each in session for value in each.intervals_ms]
        medians = (first_token.median, output_token.median)
        limit = physical_limit(work[name], point, machine, runtime[name], *medians) if machine else None
        models[name] = ModelBenchmark(
            time_to_first_token_ms=first_token,
            time_per_output_token_ms=output_token,
            inter_token_latency_ms=samples([[round(value, 4) for value in intervals]]),
            generation_ms=whole,
            throughput_tokens_per_s=1000 * point.batch_size * point.output_tokens / whole.median,
            load_time_ms=float(np.median(one.load)),
            peak_rss_bytes=None,
            limit=limit,
            weight_bytes=candidates[name].weight_bytes,
            reason="memory is measured at the first point of the grid",
        )
    return PointBenchmark(
        prompt_tokens=point.prompt_tokens,
        output_tokens=point.output_tokens,
        batch_size=point.batch_size,
        attention_backend=point.attention_backend,
        models=models,
        ratios=_ratios(timed, seed),
    )


def _with_memory(model: ModelBenchmark, peaks: Peaks | None) -> ModelBenchmark:
    if peaks is None:
        return model.model_copy(update={"reason": "peak memory was not asked for, or there is no /proc to tell"})
    whole = max(peaks.load.peak_rss_bytes, peaks.generation.peak_rss_bytes)
    found = {"peak_rss_bytes": whole, "load_memory": peaks.load, "generation_memory": peaks.generation}
    return model.model_copy(update=found | {"reason": None})


def read_back(ir: IR, spec: BenchSpec) -> dict[str, str]:
    """The runtime properties in force when the IR is compiled with the benchmark's settings."""
    try:
        return properties(ov.Core().compile_model(read_graph(ir), spec.device, device_settings(spec)))
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{ir.path}: {spec.device} can't compile it with these settings ({last_line(error)})"
        ) from error


def _ratios(timed: Mapping[str, _Latencies], seed: int, resamples: int = 5000) -> dict[str, LatencyRatios]:
    """The ratios of every two models, the later one over the earlier."""

    def over(later: str, earlier: str, figure: str) -> Ratio:
        return ratio(timed[later].of(figure), timed[earlier].of(figure), seed, resamples)

    return {
        f"{later}/{earlier}": LatencyRatios(
            time_to_first_token=over(later, earlier, "first_token_ms"),
            time_per_output_token=over(later, earlier, "output_token_ms"),
        )
        for earlier, later in itertools.combinations(timed, 2)
    }


def _measure_sessions(
    candidates: Mapping[str, _Candidate], spec: BenchSpec, backend: Backend, prompt: Sequence[int], listener: Listener
) -> dict[GridPoint, dict[str, _Latencies]]:
    """Measure a backend's points session after session until all are done, every ratio is known as precisely as asked,
    or the time is up.

    The intervals' width alone is looked at, never where they lie, so that stopping early favours no model (Chow and
    Robbins, On the asymptotic theory of fixed-width sequential confidence intervals, 1965).
    """
    points = [point for point in spec.points if point.attention_backend == backend]
    timed = {point: {name: _Latencies() for name in candidates} for point in points}
    sessions = min(spec.sessions, spec.pairs)
    rounds = math.ceil(spec.pairs / sessions)
    load_orders, run_orders = orders(candidates, spec.seed), orders(candidates, spec.seed)
    total = sessions * rounds
    begun = time.monotonic()
    for session in range(sessions):
        loads: dict[str, float] = {}
        pipelines = _load(candidates, next(load_orders), spec, backend, loads)
        for point in points:
            tokens = prompts(prompt, point)
            for name, latencies in timed[point].items():
                latencies.load.append(loads[name])
                latencies.rounds.append([])
            for _ in range(spec.warmup):
                run_round(pipelines, tuple(candidates), tokens, point)
            for index in range(rounds):
                for name, found in run_round(pipelines, next(run_orders), tokens, point).items():
                    timed[point][name].rounds[-1].append(found)
                if point == points[-1]:
                    listener(Progress(task=f"bench {backend}", done=session * rounds + index + 1, total=total))
        del pipelines
        gc.collect()
        known = session + 1 >= _LEAST_SESSIONS and _widest(timed, spec.seed) <= spec.precision
        if known or time.monotonic() - begun > spec.time_limit_s:
            listener(Progress(task=f"bench {backend}", done=total, total=total))
            break
    return timed


def _widest(timed: Mapping[GridPoint, Mapping[str, _Latencies]], seed: int) -> float:
    """Half the width of the widest interval, as a share of its median."""
    ratios = [one for at in timed.values() for one in _ratios(at, seed, _RESAMPLES_WHILE_MEASURING).values()]
    both = [figure for one in ratios for figure in (one.time_to_first_token, one.time_per_output_token)]
    return max(((one.ci95[1] - one.ci95[0]) / 2 / one.median for one in both), default=math.inf)


def _load(
    candidates: Mapping[str, _Candidate],
    order: Sequence[str],
    spec: BenchSpec,
    backend: Backend,
    loads: dict[str, float],
) -> dict[str, openvino_genai.LLMPipeline]:
    """The models' pipelines; `loads` takes their load times."""
    pipelines = {}
    for name in order:
        pipelines[name] = load_pipeline(candidates[name].ir, spec, backend, candidates[name].adapter)
        loaded = generate(pipelines[name], np.zeros((1, 1), np.int64), 2)
        loads[name] = float(loaded.perf_metrics.get_load_time())
    return pipelines
