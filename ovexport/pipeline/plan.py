"""What a recipe will do, worked out without doing it: each layer's fate, sizes, memory, time, and every problem."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ovexport.checking import Caution, Finding, sorted_problems
from ovexport.compress import operations
from ovexport.models.device import Compute, DeviceName, Precision
from ovexport.pipeline.outlook import Outlook, Shape, look_at
from ovexport.recipe import CompressSpec, DataSpec, ModelSpec, TuneSpec
from ovexport.storage.records import Record
from ovexport.trace.check import check as check_trace
from ovexport.tune.sampler import count_steps
from ovexport.weights.layer import LayerFormat


class Plan(Record):
    """The plan of a run.

    Attributes:
        packed: what the model's checkpoint is, where its weights are 4-bit codes already.
        baseline_bytes, product_bytes: weights of the BF16 and the INT4 IR.
        tuned_parameters: entries of adapters, quantization ranges and, where the recipe tunes them, norms.
        tuning_memory_bytes: weights, gradients, adapters and optimizer; activations come on top.
        compressing_seconds: None where nothing is rounded with text, or the recipe does not fix how much; a lower
            bound, from the speed of a matrix product measured now.
        tuning_steps, tuning_seconds: None where the recipe does not fix the length; the time is a lower bound as well.
        unsuitable: names of the layers that can't be compressed as the recipe asks; their note says why, and sizes
            count them in floating point.
        problems: everything that would stop the run, in the order of their exit codes.
        warnings: what the run would do otherwise than asked, and what could not be looked at.
        exit_code: of the first problem; 0 without one.
    """

    model: str
    packed: str | None
    layers: tuple[LayerFormat, ...]
    unsuitable: tuple[str, ...]
    parameters: int
    baseline_bytes: int
    product_bytes: int
    tuned_parameters: int
    tuning_memory_bytes: int
    compressing_seconds: float | None
    tuning_steps: int | None
    tuning_seconds: float | None
    disk_bytes: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    exit_code: int


@dataclass(frozen=True, slots=True)
class _Work:
    """What a recipe takes beyond the model's shape, as Plan has it."""

    compressing_seconds: float | None = None
    tuned_norms: int = 0
    steps: int | None = None
    tuning_seconds: float | None = None


def plan_model(model: ModelSpec, spec: CompressSpec) -> Plan:
    """The plan of compressing a model: layers, sizes and problems, with no text and no tuning."""
    shape = look_at(model, spec)
    return _plan(model, shape, [*shape.plan.problems, *check_trace(model, shape.problem)], _Work())


def plan_run(outlook: Outlook, findings: Sequence[Finding]) -> Plan:
    """The plan of a recipe, with what the stages' checks found."""
    recipe, shape = outlook.recipe, outlook.shape
    steps, seconds = _tuning_length(recipe.tune, recipe.data, shape)
    work = _Work(
        compressing_seconds=_compressing_seconds(recipe.compress, recipe.data, shape),
        tuned_norms=shape.norm_parameters if recipe.tune.norms else 0,
        steps=steps,
        tuning_seconds=seconds,
    )
    return _plan(recipe.model, shape, findings, work)


def _plan(model: ModelSpec, shape: Shape, findings: Sequence[Finding], work: _Work) -> Plan:
    problems = sorted_problems(findings)
    return Plan(
        model=model.id,
        packed=shape.packed,
        layers=shape.layers,
        unsuitable=tuple(layer.name for layer in shape.layers if layer.name in shape.plan.unsuitable),
        parameters=shape.parameters,
        baseline_bytes=shape.baseline_bytes,
        product_bytes=shape.product_bytes,
        tuned_parameters=shape.tuned_parameters + work.tuned_norms,
        tuning_memory_bytes=shape.tuning_memory_bytes,
        compressing_seconds=work.compressing_seconds,
        tuning_steps=work.steps,
        tuning_seconds=work.tuning_seconds,
        disk_bytes=shape.disk_bytes,
        problems=tuple(str(problem) for problem in problems),
        warnings=tuple(dict.fromkeys(str(finding) for finding in findings if isinstance(finding, Caution))),
        exit_code=problems[0].exit_code if problems else 0,
    )


def _compressing_seconds(spec: CompressSpec, data: DataSpec, shape: Shape) -> float | None:
    """Seconds that rounding with text takes at least; None where nothing is rounded so."""
    tokens = spec.calibration_sequences * data.sequence_length
    needed = operations(shape.layers, spec, shape.parameters, tokens)
    return needed / _operations_per_second(spec.device, "fp32") if needed else None


def _tuning_length(spec: TuneSpec, data: DataSpec, shape: Shape) -> tuple[int | None, float | None]:
    """Steps, and seconds they take at least: 6 operations per parameter and token (the student's forward pass 2, its
    gradients 4; the teacher runs once and for all). How long a task's examples are is known when they are read."""
    if spec.objective != "distillation":
        return spec.steps, None
    steps = spec.steps if data.train_sequences is None else count_steps(spec, data.train_sequences)
    if steps is None:
        return None, None
    per_step = spec.batch_size * spec.gradient_accumulation_steps
    needed = 6.0 * shape.parameters * per_step * data.sequence_length * steps
    return steps, needed / _operations_per_second(spec.device, spec.precision)


@cache
def _operations_per_second(device: DeviceName, precision: Precision) -> float:
    """Speed of a matrix product, best of a few."""
    compute = Compute.of(device, precision)
    matrix = torch.randn(1024, 1024, device=compute.device, dtype=compute.dtype)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = max(best, 2 * 1024**3 / (time.perf_counter() - started))
    return best
