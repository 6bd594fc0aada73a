"""Time to first token and time per output token, model after model in each round, and their ratios pair by pair."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov

from ovexport.artifacts import IR
from ovexport.bench.adapters import own_adapter, require_applied
from ovexport.bench.check import check_lengths
from ovexport.bench.limits import Work, machine_limits, physical_limit, work_of
from ovexport.bench.loading import RuntimeAdapter, device_settings
from ovexport.bench.memory import Peaks, peak_memory
from ovexport.bench.rounds import samples
from ovexport.bench.sessions import Candidate, EndedBy, Latencies, measure, ratios
from ovexport.errors import DataError, UnsupportedModelError, last_line
from ovexport.models.positions import readable_by_all
from ovexport.openvino.graph import read_graph, weights
from ovexport.openvino.identity import identify
from ovexport.openvino.runtime import check_device, properties
from ovexport.progress import Listener, silent
from ovexport.recipe import BenchSpec, GridPoint
from ovexport.reports import BenchmarkReport, Generation, MachineLimits, ModelBenchmark, PointBenchmark
from ovexport.versions import stack_versions

_PRECISIONS = {
    "u4": "INT4_ASYM",
    "i4": "INT4_SYM",
    "u8": "INT8_ASYM",
    "i8": "INT8_SYM",
    "bf16": "BF16",
    "f16": "FP16",
    "f32": "FP32",
}


def bench(
    models: Mapping[str, IR],
    spec: BenchSpec,
    prompt: Sequence[int],
    *,
    adapters: Mapping[str, RuntimeAdapter] | None = None,
    listener: Listener = silent,
) -> BenchmarkReport:
    """Measure the models; every two of them get a ratio, the one later in `models` over the earlier.

    All of it should take `spec.time_limit_s`: what memory and limits leave is shared by the attention backends.

    Args:
        prompt: token ids, at least the longest of `spec.prompt_tokens` of them.
        adapters: by model, a LoRA adapter that it runs with, in the place of the one that lies beside the IR; it is
            applied, or refused.

    Raises:
        DataError: the prompt is too short.
        RecipeError: the device is not there, or prompt and answer are longer than what a model can read.
        ArtifactError: an IR is missing or unreadable.
        UnsupportedModelError: openvino-genai can't load an IR, does not apply an adapter, or generates nothing.
    """
    if len(prompt) < max(spec.prompt_tokens):
        raise DataError(f"bench.prompt_tokens={max(spec.prompt_tokens)}: the prompt has {len(prompt)} tokens; lower it")
    check_device(spec.device)
    check_lengths(spec, readable_by_all(models.values()))
    deadline = time.monotonic() + spec.time_limit_s
    own = {name: adapter for name, ir in models.items() if (adapter := own_adapter(ir)) is not None}
    adapters = own | dict(adapters or {})
    candidates = {name: Candidate(ir=ir, adapter=adapters.get(name)) for name, ir in models.items()}
    runtime = {name: read_back(ir, spec) for name, ir in models.items()}
    applied = {name: _applied(models[name], adapter, spec, prompt) for name, adapter in adapters.items()}
    memory = {
        name: peak_memory(one.ir, spec, prompt, one.adapter) if spec.memory else None
        for name, one in candidates.items()
    }
    machine = machine_limits(runtime.values()) if spec.limits and spec.device == "CPU" else None
    timed, ended_by = _timed(candidates, spec, prompt, deadline, listener)
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
        conditions=_conditions(models, spec, runtime)
        | {
            "adapters": applied,
            "sessions": len(first),
            "pairs": sum(len(session) for session in first),
            "precision": spec.precision,
            "time_limit_s": spec.time_limit_s,
            "ended_by": ended_by,
        },
        versions=stack_versions(),
    )


def _applied(ir: IR, adapter: RuntimeAdapter, spec: BenchSpec, prompt: Sequence[int]) -> dict[str, Any]:
    """A runtime adapter's conditions, once it is known to be applied."""
    return {
        "mode": adapter.mode,
        "scale": adapter.scale,
        "layers": require_applied(ir, adapter, spec, prompt),
    }


def _timed(
    candidates: Mapping[str, Candidate], spec: BenchSpec, prompt: Sequence[int], deadline: float, listener: Listener
) -> tuple[dict[GridPoint, Mapping[str, Latencies]], dict[str, EndedBy]]:
    """The latencies at each point of the grid, and what ended the sessions of each attention backend.

    Args:
        deadline: of all of it, on the monotonic clock; each backend gets an equal share of what is left.
    """
    timed: dict[GridPoint, Mapping[str, Latencies]] = {}
    ended_by: dict[str, EndedBy] = {}
    backends = list(dict.fromkeys(spec.attention_backend))
    for waiting, backend in zip(range(len(backends), 0, -1), backends, strict=True):
        share = (deadline - time.monotonic()) / waiting
        latencies, ended_by[backend] = measure(candidates, spec, backend, prompt, share, listener)
        timed |= latencies
    return timed, ended_by


def _conditions(models: Mapping[str, IR], spec: BenchSpec, runtime: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What the figures depend on: the models, the first point of the grid, the device and its settings."""
    return {
        "models": {name: identify(ir) for name, ir in models.items()},
        **spec.points[0]._asdict(),
        "warmup": spec.warmup,
        "device": spec.device,
        "prefix_caching": False,
        "device_name": ov.Core().get_property(spec.device, "FULL_DEVICE_NAME"),
        "pinned": {name: str(value) for name, value in device_settings(spec).items()},
        "runtime": runtime,
    }


def _point(
    point: GridPoint,
    timed: Mapping[str, Latencies],
    candidates: Mapping[str, Candidate],
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
            weight_precision=_weight_precision(candidates[name].ir),
            generations=_listed(one),
            reason="memory is measured at the first point of the grid",
        )
    return PointBenchmark(
        prompt_tokens=point.prompt_tokens,
        output_tokens=point.output_tokens,
        batch_size=point.batch_size,
        attention_backend=point.attention_backend,
        models=models,
        ratios=ratios(timed, seed),
    )


def _listed(timed: Latencies) -> tuple[Generation, ...]:
    first = (timed.warmup.listed(warmup=True),) if timed.warmup else ()
    return (*first, *(one.listed() for session in timed.rounds for one in session))


def _weight_precision(ir: IR) -> str:
    """The narrowest that a Linear layer is stored in, since a model of 4-bit layers keeps some in 8 bits."""
    linears = [weight for weight in weights(read_graph(ir)) if weight.layer_kind == "linear"]
    narrowest = min(linears, key=lambda weight: (weight.bits, -weight.elements), default=None)
    return _PRECISIONS.get(narrowest.element_type, narrowest.element_type.upper()) if narrowest else ""


def _with_memory(model: ModelBenchmark, peaks: Peaks | None) -> ModelBenchmark:
    if peaks is None:
        return model.model_copy(update={"reason": "peak memory was not asked for, or there is no /proc to tell"})
    whole = max(peaks.load.peak_rss_bytes, peaks.generation.peak_rss_bytes)
    memory = {"peak_rss_bytes": whole, "load_memory": peaks.load, "generation_memory": peaks.generation}
    return model.model_copy(update=memory | {"reason": None})


def read_back(ir: IR, spec: BenchSpec) -> dict[str, str]:
    """The runtime properties in force when the IR is compiled with the benchmark's settings."""
    try:
        return properties(ov.Core().compile_model(read_graph(ir), spec.device, device_settings(spec)))
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"{ir.path}: {spec.device} can't compile it with these settings ({last_line(error)})"
        ) from error
