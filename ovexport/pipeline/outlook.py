"""What can be seen of a run before any work: its model, its tokenizer and its text, each looked at once."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ovexport.checking import Finding, raised
from ovexport.compress import limit_of, replaces_weights
from ovexport.errors import ArtifactError, OvexportError
from ovexport.evaluate import choose_prompts
from ovexport.models.architecture import Architecture
from ovexport.models.loading import DTYPES, load_config, load_own_tokenizer, open_packed, skeleton
from ovexport.models.norms import find_norms
from ovexport.models.positions import readable_tokens
from ovexport.pipeline.stage import Stage
from ovexport.prepare import Survey, missing_files, survey
from ovexport.recipe import CompressSpec, ModelSpec, Recipe
from ovexport.storage.files import existing_parent
from ovexport.weights.layer import LayerFormat
from ovexport.weights.plan import LayerPlan, examine_layers
from ovexport.weights.policy import BUDGET_GROUP_SIZES
from ovexport.weights.ranks import RankSpace
from ovexport.wording import byte_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is known of a model without its weights.

    Attributes:
        replaces_weights: the starting point has weights of its own, in float32.
        norm_parameters: entries of the weights and biases of normalization layers.
        budget_bytes: of the packed matrices, where a budget chooses their formats; `plan` has the recipe's own then.
        packed: what the checkpoint is, where its weights are 4-bit codes already.
        positions: how many tokens the model can read; None if it has no limit, or if that is not known.
        problem: why nothing is known.
    """

    plan: LayerPlan = field(default_factory=LayerPlan)
    parameters: int = 0
    norm_parameters: int = 0
    bytes_per_parameter: int = 2
    replaces_weights: bool = False
    budget_bytes: int | None = None
    packed: str | None = None
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
        """The weights of the INT4 IR, and of an adapter beside it."""
        packed = [layer for layer in self.layers if layer.encoding]
        replaced = sum(layer.out_features * layer.in_features for layer in packed)
        rest = (self.parameters - replaced) * self.bytes_per_parameter
        beside = sum(4 * layer.adapter_size for layer in packed if layer.adapter == "beside")
        own = sum(layer.weight_bytes for layer in packed)
        return rest + beside + (own if self.budget_bytes is None else self.budget_bytes)

    @property
    def tuned_weights(self) -> int:
        """Entries of the matrices that have an adapter."""
        return sum(layer.out_features * layer.in_features for layer in self.layers if layer.rank)

    @property
    def tuned_parameters(self) -> int:
        """Entries of adapters and quantization ranges."""
        tuned = [layer for layer in self.layers if layer.rank]
        ranges = sum(
            layer.out_features * layer.groups * (1 if layer.require_encoding().symmetric else 2)
            for layer in tuned
            if layer.adapter == "lora"
        )
        return ranges + sum(layer.adapter_size for layer in tuned)

    @property
    def tuning_memory_bytes(self) -> int:
        """The base weights, the student's and the sums of their gradients; parameters, gradients and two moments."""
        base = (4 if self.replaces_weights else self.bytes_per_parameter) * self.tuned_weights
        return base + 4 * self.parameters + 4 * self.tuned_weights + 4 * 4 * self.tuned_parameters

    @property
    def disk_bytes(self) -> int:
        """Three IRs, two of them packed twice, and two checkpoints with two optimizer states; but the roundings that a
        budget chooses from, if they take more: they are gone when the first checkpoint is written."""
        checkpoints = 4 * 9 * self.tuned_parameters + (2 * 4 * self.tuned_weights if self.replaces_weights else 0)
        roundings = 0 if self.budget_bytes is None else (len(BUDGET_GROUP_SIZES) + 2) * self.tuned_weights
        return max(self.baseline_bytes * 2 + self.product_bytes * 4 + checkpoints, self.baseline_bytes + roundings)


def look_at(model: ModelSpec, spec: CompressSpec) -> Shape:
    """A model's shape; if it can't be known, its `problem` says why."""
    try:
        network = skeleton(model)
        config = load_config(model)
        packed = open_packed(model)
        matrices = Architecture(network).all_matrices()
        plan = examine_layers(packed.marked(matrices) if packed else matrices, spec)
        return Shape(
            plan=plan,
            budget_bytes=limit_of(spec, plan.layers) if spec.budget else None,
            packed=packed.describe() if packed else None,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            norm_parameters=sum(norm.parameter.numel() for norm in find_norms(network)),
            bytes_per_parameter=DTYPES.get(model.dtype, config.dtype or torch.float32).itemsize,
            replaces_weights=replaces_weights(spec),
            positions=readable_tokens(config.to_dict()),
        )
    except OvexportError as error:
        return Shape(problem=error)


class Outlook:
    """A run before any work. The stages' checks say what of it stops them.

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
        """The model's; None if it can't be loaded, which the stage prepare says."""
        try:
            return load_own_tokenizer(self.recipe.model)
        except OvexportError:
            return None

    @cached_property
    def text(self) -> Survey:
        """The run's; nothing is known of it without a tokenizer."""
        if self.tokenizer is None:
            return Survey(findings=tuple(missing_files(self.recipe.data, self.recipe.task)))
        return survey(self.tokenizer, self.recipe.data, self.recipe.task, self.shape.positions)

    @property
    def tokenized_texts(self) -> Sequence[str]:
        """The documents and prompts that the IR's tokenizer has to encode as the model's does; without the prompts if
        they can't be read, which the stage evaluate says."""
        spec = self.recipe.evaluate
        if spec.prompts is None:
            return self.text.checked_documents
        try:
            return (*self.text.checked_documents, *choose_prompts((), spec).texts)
        except OvexportError:
            return self.text.checked_documents

    @property
    def test_tokens(self) -> int | None:
        """How many tokens the test text has; None if that is not known yet."""
        sequences = self.text.sequences.get("test")
        return None if sequences is None else sequences * self.recipe.data.sequence_length

    @property
    def rank_space(self) -> RankSpace | None:
        """The ranks that the adapters can have; None if the layers are not known."""
        spec = self.recipe.compress
        if not self.shape.layers or self.shape.plan.problems:
            return None
        return RankSpace.of(self.shape.layers, spec.rank_space or (), spec.rank_by)


def findings(stages: Sequence[Stage[Outlook]], outlook: Outlook) -> Iterator[Finding]:
    """What the stages' checks say of a run, and whether its folder has room."""
    for stage in stages:
        yield from stage.check(outlook)
    yield from raised(_check_disk, outlook.out, outlook.shape.disk_bytes)


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
