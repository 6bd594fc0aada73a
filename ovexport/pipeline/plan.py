"""What a recipe will do, worked out without doing it: each layer's fate, sizes, memory, time, and every problem."""

import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ovexport import bench, compress, evaluate, tune
from ovexport.checking import Caution, Finding, raised
from ovexport.errors import ArtifactError, OvexportError
from ovexport.gates import judging
from ovexport.models.architecture import Architecture
from ovexport.models.loading import DTYPES, check_checkpoint, load_config, load_tokenizer, skeleton
from ovexport.models.positions import readable_tokens
from ovexport.openvino.tokenizer import check_tokenizer
from ovexport.prepare import Survey, missing_files, survey
from ovexport.recipe import CompressSpec, DataSpec, ModelSpec, Recipe, TuneSpec
from ovexport.storage.files import existing_parent
from ovexport.storage.records import Record
from ovexport.tasks import require_harness
from ovexport.weights.layer import LayerFormat
from ovexport.weights.plan import LayerPlan, examine_layers
from ovexport.weights.ranks import RankSpace
from ovexport.wording import byte_size


class Plan(Record):
    """The plan of a run.

    Attributes:
        baseline_bytes, product_bytes: weights of the BF16 and the INT4 IR.
        tuned_parameters: entries of adapters and quantization ranges.
        tuning_memory_bytes: weights, gradients, adapters and optimizer; activations come on top.
        tuning_steps, tuning_seconds: None where the recipe does not fix the length; the time is a lower bound, from
            the speed of a matrix product measured now.
        unsuitable: names of the layers that can't be compressed as the recipe asks; their note says why, and sizes
            count them in floating point.
        problems: everything that would stop the run, in the order of their exit codes.
        warnings: what the run would do otherwise than asked, and what could not be looked at.
        exit_code: of the first problem; 0 without one.
    """

    model: str
    layers: tuple[LayerFormat, ...]
    unsuitable: tuple[str, ...]
    parameters: int
    baseline_bytes: int
    product_bytes: int
    tuned_parameters: int
    tuning_memory_bytes: int
    tuning_steps: int | None
    tuning_seconds: float | None
    disk_bytes: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is known of a model without its weights.

    Attributes:
        replaces_weights: the starting point has weights of its own, in float32.
        positions: how many tokens the model can read; None where it has no limit, or is not known.
        problem: why nothing is known.
    """

    plan: LayerPlan = field(default_factory=LayerPlan)
    parameters: int = 0
    bytes_per_parameter: int = 2
    replaces_weights: bool = False
    positions: int | None = None
    problem: OvexportError | None = None

    @property
    def layers(self) -> tuple[LayerFormat, ...]:
        """The fate of each."""
        return self.plan.layers

    @property
    def baseline_bytes(self) -> int:
        """The weights of the BF16 IR."""
        return self.parameters * self.bytes_per_parameter

    @property
    def product_bytes(self) -> int:
        """The weights of the INT4 IR."""
        packed = [layer for layer in self.layers if layer.encoding]
        replaced = sum(layer.out_features * layer.in_features for layer in packed)
        rest = (self.parameters - replaced) * self.bytes_per_parameter
        return rest + sum(layer.weight_bytes for layer in packed)

    @property
    def tuned_weights(self) -> int:
        """Entries of the matrices that have an adapter."""
        return sum(layer.out_features * layer.in_features for layer in self.layers if layer.rank)

    @property
    def tuned_parameters(self) -> int:
        """Entries of adapters and quantization ranges."""
        tuned = [layer for layer in self.layers if layer.rank]
        ranges = sum(
            layer.out_features * layer.groups * (1 if layer.require_encoding().symmetric else 2) for layer in tuned
        )
        return ranges + sum(layer.rank * (layer.out_features + layer.in_features) for layer in tuned)

    @property
    def tuning_memory_bytes(self) -> int:
        """The base weights, the student's and the sums of their gradients; parameters, gradients and two moments."""
        base = (4 if self.replaces_weights else self.bytes_per_parameter) * self.tuned_weights
        return base + 4 * self.parameters + 4 * self.tuned_weights + 4 * 4 * self.tuned_parameters

    @property
    def disk_bytes(self) -> int:
        """Three IRs, two of them packed twice, and two checkpoints with two optimizer states."""
        checkpoints = 4 * 9 * self.tuned_parameters + (2 * 4 * self.tuned_weights if self.replaces_weights else 0)
        return self.baseline_bytes * 2 + self.product_bytes * 4 + checkpoints


def look_at(model: ModelSpec, spec: CompressSpec) -> Shape:
    """A model's shape; where it can't be had, its `problem` says why."""
    try:
        network = skeleton(model)
        config = load_config(model)
        return Shape(
            plan=examine_layers(Architecture(network).all_matrices(), spec),
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            bytes_per_parameter=DTYPES.get(model.dtype, config.dtype or torch.float32).itemsize,
            replaces_weights=compress.replaces_weights(spec),
            positions=readable_tokens(config.to_dict()),
        )
    except OvexportError as error:
        return Shape(problem=error)


class Outlook:
    """A run before any work: what can be seen of its model and text, each looked at once, and what each stage's check
    says of them.

    Args:
        out: the run's folder.
    """

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe = recipe
        self.out = out

    @cached_property
    def shape(self) -> Shape:
        """The model's."""
        return look_at(self.recipe.model, self.recipe.compress)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's; None where it can't be loaded, which the stage prepare says."""
        try:
            return _tokenizer(self.recipe.model)
        except OvexportError:
            return None

    @cached_property
    def text(self) -> Survey:
        """The run's; nothing is known of it where there is no tokenizer."""
        if self.tokenizer is None:
            return Survey(findings=tuple(missing_files(self.recipe.data, self.recipe.task)))
        return survey(self.tokenizer, self.recipe.data, self.recipe.task, self.shape.positions)

    def prepare(self) -> Iterator[Finding]:
        """Of the stage prepare."""
        if self.recipe.task is not None:
            yield from raised(require_harness)
        yield from raised(_tokenizer, self.recipe.model)
        yield from self.text.findings

    def trace(self) -> Iterator[Finding]:
        """Of the stage trace."""
        if self.shape.problem:
            yield self.shape.problem
        yield from raised(_local_weights, self.recipe.model)
        yield from raised(self._tokenizer_of_the_ir)

    def _tokenizer_of_the_ir(self) -> None:
        """Let the run's first documents and its prompts go through the tokenizer that the IR is going to have."""
        spec = self.recipe.evaluate
        texts = list(self.text.checked_documents)
        if spec.prompts is not None:
            texts += evaluate.choose_prompts((), spec).texts
        check_tokenizer(self.recipe.model, texts, templated=spec.chat_template == "auto")

    def compress(self) -> Iterator[Finding]:
        """Of the stage compress."""
        yield from self.shape.plan.problems
        yield from raised(compress.check, self.shape.layers, self.recipe.compress)

    def tune(self) -> Iterator[Finding]:
        """Of the stage tune."""
        yield from raised(tune.check_device, self.recipe.tune)
        ranks, spec = self.recipe.search.ranks, self.recipe.compress
        if ranks is not None and self.shape.layers and not self.shape.plan.problems:
            space = RankSpace.of(self.shape.layers, spec.rank_space or (), spec.rank_by)
            yield from raised(space.chosen, ranks, "search.ranks")

    def evaluate(self) -> Iterator[Finding]:
        """Of the stage evaluate."""
        documents, positions = self.text.test_documents, self.shape.positions
        yield from evaluate.check(self.recipe.evaluate, self.tokenizer, documents, positions)

    def bench(self) -> Iterator[Finding]:
        """Of the stage bench."""
        sequences = self.text.sequences.get("test")
        tokens = None if sequences is None else sequences * self.recipe.data.sequence_length
        yield from bench.check(self.recipe.bench, tokens, self.shape.positions)

    def report(self) -> Iterator[Finding]:
        """Of the stage report."""
        yield from raised(judging.check_recipe, self.recipe)

    def folder(self) -> Iterator[Finding]:
        """Of the run's folder."""
        yield from raised(_check_disk, self.out, self.shape.disk_bytes)


def sorted_problems(findings: Iterable[Finding]) -> list[OvexportError]:
    """The problems, each once, in the order of their exit codes."""
    problems = {str(found): found for found in findings if isinstance(found, OvexportError)}
    return sorted(problems.values(), key=lambda problem: problem.exit_code)


def plan_model(model: ModelSpec, spec: CompressSpec) -> Plan:
    """The plan of compressing a model: layers, sizes and problems, with no text and no tuning."""
    shape = look_at(model, spec)
    findings = [*shape.plan.problems, *raised(check_tokenizer, model), *raised(_local_weights, model)]
    return _plan(model, shape, [*([shape.problem] if shape.problem else []), *findings], steps=None, seconds=None)


def plan_run(outlook: Outlook, findings: Sequence[Finding]) -> Plan:
    """The plan of a recipe, with what the stages' checks found."""
    recipe, shape = outlook.recipe, outlook.shape
    steps, seconds = _tuning_length(recipe.tune, recipe.data, shape)
    return _plan(recipe.model, shape, findings, steps=steps, seconds=seconds)


def _plan(
    model: ModelSpec, shape: Shape, findings: Sequence[Finding], *, steps: int | None, seconds: float | None
) -> Plan:
    problems = sorted_problems(findings)
    return Plan(
        model=model.id,
        layers=shape.layers,
        unsuitable=tuple(layer.name for layer in shape.layers if layer.name in shape.plan.unsuitable),
        parameters=shape.parameters,
        baseline_bytes=shape.baseline_bytes,
        product_bytes=shape.product_bytes,
        tuned_parameters=shape.tuned_parameters,
        tuning_memory_bytes=shape.tuning_memory_bytes,
        tuning_steps=steps,
        tuning_seconds=seconds,
        disk_bytes=shape.disk_bytes,
        problems=tuple(str(problem) for problem in problems),
        warnings=tuple(dict.fromkeys(str(found) for found in findings if isinstance(found, Caution))),
        exit_code=problems[0].exit_code if problems else 0,
    )


def _tuning_length(spec: TuneSpec, data: DataSpec, shape: Shape) -> tuple[int | None, float | None]:
    """Steps, and seconds they take at least: 6 operations per parameter and token (the student's forward pass 2, its
    gradients 4; the teacher runs once and for all). How long a task's examples are is known when they are read."""
    if spec.objective == "task":
        return spec.steps, None
    per_step = spec.batch_size * spec.gradient_accumulation_steps
    steps = spec.steps
    if steps is None and data.train_sequences is not None:
        steps = math.ceil((spec.epochs or 1) * data.train_sequences / per_step)
    if steps is None:
        return None, None
    operations = 6.0 * shape.parameters * per_step * data.sequence_length * steps
    return steps, operations / _operations_per_second(spec)


def _operations_per_second(spec: TuneSpec) -> float:
    """Speed of a matrix product as tuning would compute it, best of a few."""
    device = tune.device_of(spec)
    matrix = torch.randn(1024, 1024, device=device, dtype=tune.arithmetic(spec, device))
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = max(best, 2 * 1024**3 / (time.perf_counter() - started))
    return best


def _tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase:
    return load_tokenizer(model, load_config(model).get_text_config().vocab_size)


def _local_weights(model: ModelSpec) -> None:
    """Look at the weights of a folder; those of the hub are not downloaded to plan."""
    if Path(model.id).is_dir():
        check_checkpoint(model)


def _check_disk(out: Path, needed: int) -> None:
    existing = existing_parent(out)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ArtifactError(
            f"{out}: {byte_size(free)} free on the disk, and the run needs about {byte_size(needed)}; "
            "free some, or choose another --out"
        )
    if not os.access(existing, os.W_OK):
        raise ArtifactError(f"{out}: can't be written; choose another --out")
