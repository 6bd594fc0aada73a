"""What a recipe will do, worked out without doing it: each layer's fate, sizes, memory, time, and every problem."""

import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ovexport.artifacts import LayerFormat, Record, existing_parent
from ovexport.errors import ArtifactError, DataError, OvexportError
from ovexport.evaluate import check_encoder, choose_prompts
from ovexport.gates import check_recipe as check_gates
from ovexport.layers import plan_layers
from ovexport.model import DTYPES, load_config, skeleton, weight_matrices
from ovexport.ranks import RankSpace
from ovexport.recipe import CompressSpec, DataSpec, EvaluateSpec, ModelSpec, Recipe, TaskSpec, TuneSpec
from ovexport.runtime import check_device
from ovexport.tasks import require_harness
from ovexport.tokenizer import check_tokenizer
from ovexport.tune import arithmetic, device_of
from ovexport.tune import check_device as check_tuning_device


class Plan(Record):
    """The plan of a run.

    Attributes:
        baseline_bytes, product_bytes: weights of the BF16 and the INT4 IR.
        tuned_parameters: entries of adapters and quantization ranges.
        tuning_memory_bytes: weights, gradients, adapters and optimizer; activations come on top.
        tuning_steps, tuning_seconds: None where the recipe does not fix the length; the time is a lower bound, from
            the speed of a matrix product measured now.
        problems: everything that would stop the run.
        exit_code: of the first problem; 0 without one.
    """

    model: str
    layers: tuple[LayerFormat, ...]
    parameters: int
    baseline_bytes: int
    product_bytes: int
    tuned_parameters: int
    tuning_memory_bytes: int
    tuning_steps: int | None
    tuning_seconds: float | None
    disk_bytes: int
    problems: tuple[str, ...]
    exit_code: int


@dataclass(frozen=True, slots=True)
class _Shape:
    """What is known of a model without its weights.

    Attributes:
        changed: the starting point has weights of its own, in float32.
    """

    layers: tuple[LayerFormat, ...] = ()
    parameters: int = 0
    bytes_per_parameter: int = 2
    changed: bool = False

    @property
    def baseline_bytes(self) -> int:
        return self.parameters * self.bytes_per_parameter

    @property
    def product_bytes(self) -> int:
        packed = [layer for layer in self.layers if layer.mode != "float"]
        replaced = sum(layer.out_features * layer.in_features for layer in packed)
        rest = (self.parameters - replaced) * self.bytes_per_parameter
        return rest + sum(layer.weight_bytes for layer in packed)

    @property
    def tuned_weights(self) -> int:
        """Entries of the matrices that have an adapter."""
        return sum(layer.out_features * layer.in_features for layer in self.layers if layer.rank)

    @property
    def tuned_parameters(self) -> int:
        tuned = [layer for layer in self.layers if layer.rank]
        ranges = sum(layer.out_features * layer.groups * (1 if layer.mode == "int4_sym" else 2) for layer in tuned)
        return ranges + sum(layer.rank * (layer.out_features + layer.in_features) for layer in tuned)

    @property
    def tuning_memory_bytes(self) -> int:
        """The base weights, the student's and the sums of their gradients; parameters, gradients and two moments."""
        base = (4 if self.changed else self.bytes_per_parameter) * self.tuned_weights
        return base + 4 * self.parameters + 4 * self.tuned_weights + 4 * 4 * self.tuned_parameters

    @property
    def disk_bytes(self) -> int:
        """Three IRs, two of them packed twice, and two checkpoints with two optimizer states."""
        checkpoints = 4 * 9 * self.tuned_parameters + (2 * 4 * self.tuned_weights if self.changed else 0)
        return self.baseline_bytes * 2 + self.product_bytes * 4 + checkpoints


def plan_model(model: ModelSpec, compress: CompressSpec) -> Plan:
    """The plan of compressing a model: layers, sizes and problems, with no text and no tuning."""
    shape, problems = _examine(model, compress, [lambda _: check_tokenizer(model)])
    return _plan(model, shape, problems, steps=None, seconds=None)


def plan(recipe: Recipe, out: Path) -> Plan:
    """The plan of a recipe; problems are collected, not raised."""
    shape, problems = _examine_recipe(recipe, out)
    steps, seconds = _tuning_length(recipe.tune, recipe.data, shape)
    return _plan(recipe.model, shape, problems, steps=steps, seconds=seconds)


def check_runnable(recipe: Recipe, out: Path) -> None:
    """Refuse a recipe that can't be carried out, before any work starts.

    Raises:
        OvexportError: with every problem at once, of the class of the first.
    """
    problems = _examine_recipe(recipe, out)[1]
    if problems:
        raise type(problems[0])("; ".join(str(problem) for problem in problems))


def _examine_recipe(recipe: Recipe, out: Path) -> tuple[_Shape, list[OvexportError]]:
    return _examine(
        recipe.model,
        recipe.compress,
        [
            lambda _: check_gates(recipe),
            lambda _: _check_sources(recipe.data),
            lambda _: _check_task(recipe.task),
            lambda _: check_encoder(recipe.evaluate.encoder),
            lambda _: _check_prompts(recipe.evaluate),
            lambda _: _check_tokenizer(recipe.model, recipe.evaluate),
            lambda _: check_tuning_device(recipe.tune),
            lambda _: check_device(recipe.bench.device),
            lambda shape: _check_ranks(recipe, shape.layers),
            lambda shape: _check_disk(out, shape.disk_bytes),
        ],
    )


def _examine(
    model: ModelSpec, compress: CompressSpec, checks: Sequence[Callable[[_Shape], object]]
) -> tuple[_Shape, list[OvexportError]]:
    """The model's shape and every problem, each once."""
    problems: dict[str, OvexportError] = {}
    shape = _Shape()
    try:
        network = skeleton(model)
        dtype = DTYPES.get(model.dtype, load_config(model).dtype or torch.float32)
        shape = _Shape(
            layers=plan_layers(weight_matrices(network), compress),
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            bytes_per_parameter=dtype.itemsize,
            changed=compress.awq or compress.gptq,
        )
    except OvexportError as error:
        problems[str(error)] = error
    for check in checks:
        try:
            check(shape)
        except OvexportError as error:
            problems.setdefault(str(error), error)
    return shape, list(problems.values())


def _plan(
    model: ModelSpec, shape: _Shape, problems: Sequence[OvexportError], *, steps: int | None, seconds: float | None
) -> Plan:
    return Plan(
        model=model.id,
        layers=shape.layers,
        parameters=shape.parameters,
        baseline_bytes=shape.baseline_bytes,
        product_bytes=shape.product_bytes,
        tuned_parameters=shape.tuned_parameters,
        tuning_memory_bytes=shape.tuning_memory_bytes,
        tuning_steps=steps,
        tuning_seconds=seconds,
        disk_bytes=shape.disk_bytes,
        problems=tuple(str(problem) for problem in problems),
        exit_code=problems[0].exit_code if problems else 0,
    )


def _tuning_length(tune: TuneSpec, data: DataSpec, shape: _Shape) -> tuple[int | None, float | None]:
    """Steps, and seconds they take at least: 6 operations per parameter and token (the student's forward pass 2, its
    gradients 4; the teacher runs once and for all). How long a task's examples are is known when they are read."""
    if tune.objective == "task":
        return tune.steps, None
    per_step = tune.batch_size * tune.gradient_accumulation_steps
    steps = tune.steps
    if steps is None and data.train_sequences is not None:
        steps = math.ceil((tune.epochs or 1) * data.train_sequences / per_step)
    if steps is None:
        return None, None
    operations = 6.0 * shape.parameters * per_step * data.sequence_length * steps
    return steps, operations / _operations_per_second(tune)


def _operations_per_second(tune: TuneSpec) -> float:
    """Speed of a matrix product as tuning would compute it, best of a few."""
    device = device_of(tune)
    matrix = torch.randn(1024, 1024, device=device, dtype=arithmetic(tune, device))
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = max(best, 2 * 1024**3 / (time.perf_counter() - started))
    return best


def _check_sources(data: DataSpec) -> None:
    for name in ("train", "validation", "test"):
        source = getattr(data, name)
        if source is not None and source.path is not None and not Path(source.path).is_file():
            raise DataError(
                f"data.{name}.path={source.path}: no such file; paths are looked for beside the recipe, then in the "
                "working directory"
            )


def _check_task(task: TaskSpec | None) -> None:
    if task is None:
        return
    for split, path in task.files.items():
        if not Path(path).is_file():
            raise DataError(
                f"task.{split}={path}: no such file; paths are looked for beside the recipe, then in the working "
                "directory"
            )
    require_harness()


def _check_ranks(recipe: Recipe, layers: Sequence[LayerFormat]) -> None:
    if recipe.search.ranks is not None and layers:
        compress = recipe.compress
        RankSpace.of(layers, compress.rank_space or (), compress.rank_by).chosen(recipe.search.ranks, "search.ranks")


def _check_prompts(evaluate: EvaluateSpec) -> None:
    if evaluate.prompts is not None:
        choose_prompts((), evaluate)


def _check_tokenizer(model: ModelSpec, evaluate: EvaluateSpec) -> None:
    prompts = choose_prompts((), evaluate).texts if evaluate.prompts is not None else ()
    check_tokenizer(model, prompts, templated=evaluate.chat_template == "auto")


def _check_disk(out: Path, needed: int) -> None:
    existing = existing_parent(out)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ArtifactError(
            f"{out}: {free / 1e9:.2f} GB free on the disk, and the run needs about {needed / 1e9:.2f} GB; "
            "free some, or choose another --out"
        )
    if not os.access(existing, os.W_OK):
        raise ArtifactError(f"{out}: can't be written; choose another --out")
