"""One tuning: the student, what it is tuned for, and one optimizer step."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ovexport.artifacts import Checkpoint, PreparedData
from ovexport.errors import UnsupportedModelError
from ovexport.models.device import Compute
from ovexport.models.head import gives_logits
from ovexport.models.norms import require_norms
from ovexport.models.student import Student
from ovexport.models.uncompressed import UncompressedModel, load_uncompressed
from ovexport.objectives import Material, Objective, build_objective, count_train_examples
from ovexport.progress import Listener
from ovexport.recipe import ModelSpec, TuneSpec
from ovexport.tune.optimizer import MovingAverages, Optimizer
from ovexport.tune.sampler import Sampler
from ovexport.tune.state import restore_tensors, state_tensors
from ovexport.weights.norm import TunedNorm
from ovexport.weights.ranks import RankSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step did.

    Attributes:
        loss_nats: mean per token over the step's microbatches.
        tokens: that were read.
        gradient_norm: before it was scaled down.
        taken: false if either is not finite; nothing was changed then.
    """

    loss_nats: float
    tokens: int
    gradient_norm: float
    taken: bool


class Trainer:
    """Takes optimizer steps from a starting point, and validates.

    Args:
        start: the adapters' values that `reset` goes back to.
        norms: that are tuned.
        measurable: whether the student's logits are its head of its hidden states; without that nothing can be
            measured.

    Attributes:
        sampler: what each step reads; where ranks are a choice, each step draws a configuration.
        optimizer: made again by `reset`.
    """

    def __init__(
        self,
        student: Student,
        objective: Objective,
        sampler: Sampler,
        spec: TuneSpec,
        start: Checkpoint,
        *,
        norms: Sequence[TunedNorm] = (),
        measurable: bool = True,
    ) -> None:
        self.student = student
        self.objective = objective
        self.sampler = sampler
        self.spec = spec
        self.start = start
        self.norms = tuple(norms)
        self._measurable = measurable
        self._head = student.head
        self.reset(spec.learning_rate, sampler.steps)

    @property
    def steps(self) -> int:
        """Optimizer steps in all; 0 if nothing is tuned."""
        return self.sampler.steps

    @property
    def space(self) -> RankSpace:
        """The ranks that the adapters can have."""
        return self.sampler.space

    def reset(self, learning_rate: float, steps: int) -> None:
        """Go back to the starting point, with a learning rate of the adapters and a schedule over so many steps."""
        self.student.load_parameters(self.start.adapters)
        self._prepare_step(0)
        trained = self.student.trained
        self.optimizer = Optimizer(trained, self.spec, learning_rate, steps)
        self._averages = MovingAverages(trained, self.spec.ema_decay)

    def step(self, index: int) -> StepResult:
        """One optimizer step; one whose loss or gradient is not finite changes nothing."""
        self.optimizer.schedule(index)
        microbatches = self.sampler.microbatches(index)
        weight = sum(map(self.objective.weight, microbatches))
        total = 0.0
        with self._seeded(index):
            for indices in microbatches:
                loss = self.objective.loss(self.student.network, self._head, indices, weight)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        self.student.backward_through_quantizers()
        norm = self.optimizer.clip_gradients()
        taken = math.isfinite(total) and math.isfinite(norm)
        if taken:
            self.optimizer.update()
            self._averages.follow(self.optimizer.updates)
        self.student.drop_gradients()
        if taken or self.space.is_choice:
            self._prepare_step(index + 1)
        tokens = sum(map(self.objective.tokens, microbatches))
        return StepResult(loss_nats=total, tokens=tokens, gradient_norm=norm, taken=taken)

    @torch.no_grad()
    def validate(self) -> float:
        """The objective's figure of what would be kept; with the median ranks where there is a choice.

        NaN for a model that can't be tuned.
        """
        if not self._measurable:
            return math.nan
        everything = range(self.objective.validation_examples)
        with self._settled():
            return self.objective.score(self.student.network, self._head, everything)

    def kept(self) -> dict[str, NDArray[np.generic]]:
        """What a checkpoint of the present step holds, by name."""
        with self._settled():
            return {key: value.cpu().numpy().copy() for key, value in self.student.stored().items()}

    def state(self) -> dict[str, NDArray[np.generic]]:
        """What `restore` goes on from, by name."""
        return state_tensors(self.student, self.optimizer, self._averages)

    def restore(self, tensors: Mapping[str, NDArray[np.generic]], step: int, updates: int) -> None:
        """Go on from a state saved after so many steps and updates.

        Raises:
            KeyError: the state lacks a tensor; nothing was changed.
        """
        restore_tensors(tensors, updates, self.student, self.optimizer, self._averages)
        self._prepare_step(step)

    @contextmanager
    def _seeded(self, index: int) -> Iterator[None]:
        """Within, what dropout draws follows from the seed and the step alone: a resumed tuning draws the same."""
        if not self.spec.adapter_dropout:
            yield
            return
        device = self.student.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(np.random.default_rng((self.spec.seed, index)).integers(2**63)))
            yield

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Within, parameters, ranks and weights are what is kept: moving averages and the median ranks, if there are
        any, and the weights that ship."""
        averages, choice = self._averages.values, self.space.is_choice
        if not averages and not choice and self.student.trains_what_ships:
            yield
            return
        present = {key: value.detach().clone() for key, value in self.student.trained.items()} if averages else {}
        self.student.assign(averages)
        if choice:
            self.student.activate(self.space.by_layer(self.space.median))
        self.student.settle_weights()
        try:
            yield
        finally:
            self.student.assign(present)
            self._prepare_step(self._next_step)

    def _prepare_step(self, index: int) -> None:
        """Set the weights to what the next step sees of the parameters."""
        self._next_step = index
        if self.space.is_choice:
            self.student.activate(self.space.by_layer(self.sampler.ranks(index)))
        self.student.quantize_weights()


def make_trainer(
    start: Checkpoint, model: ModelSpec, spec: TuneSpec, data: PreparedData, compute: Compute, listener: Listener
) -> Trainer:
    """Load the model and make all that a tuning needs.

    Raises:
        RecipeError, PlugInError: the objective is unknown, or the plug-in with it fails.
        UnsupportedModelError: the model's logits are not its head of its hidden states.
    """
    manifest = start.manifest
    tunable = spec.norms or any(layer.rank for layer in manifest.layers)
    examples = count_train_examples(spec.objective, data)
    sampler = Sampler.of(spec, examples, manifest.elastic_ranks, tunable=tunable)
    base = load_uncompressed(model, manifest.layers, compute)
    norms = tuple(norm.record() for norm in require_norms(base.network)) if spec.norms else ()
    measurable = _is_measurable(base, data, compute)
    if sampler.steps and not measurable:
        raise UnsupportedModelError(
            f"{base.network.config.model_type}: tuning needs logits = lm_head(last_hidden_state), and this model "
            "computes them differently; set tune.steps = 0 to convert it without tuning"
        )
    objective = build_objective(
        Material(
            base=base, compute=compute, spec=spec, model=model, data=data, train=sampler.examples, listener=listener
        )
    )
    fixed = () if spec.zero_point_learning_rate else ("zero_point",)
    student = Student(
        base.network, start, base.own_weights, compute.dtype, fixed=fixed, norms=[each.name for each in norms]
    )
    if spec.adapter_dropout:
        student.drop_adapter_inputs(spec.adapter_dropout)
    if spec.gradient_checkpointing:
        student.checkpoint_gradients()
    return Trainer(student, objective, sampler, spec, start, norms=norms, measurable=measurable)


def _is_measurable(base: UncompressedModel, data: PreparedData, compute: Compute) -> bool:
    ids = torch.from_numpy(data.tokens("validation").astype(np.int64)).to(compute.device)
    with compute.autocast():
        return gives_logits(base.head, base.network, ids)
