"""One tuning: the student, what it is tuned for, and one optimizer step."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from torch import nn

from ovexport.artifacts import Checkpoint, PreparedData
from ovexport.errors import UnsupportedModelError
from ovexport.models.architecture import compute_in
from ovexport.models.head import Head, is_plain
from ovexport.models.loading import load_model
from ovexport.models.matrix_view import matrix_view
from ovexport.models.student import Student
from ovexport.objectives.objectives import Answers, Distillation
from ovexport.progress import Listener
from ovexport.recipe import ModelSpec, TuneSpec
from ovexport.weights.quantizer import load_quantizer
from ovexport.weights.ranks import Configuration

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

_REFERENCE_ELEMENTS = 2**22
_REFERENCE_LENGTH = 64
_FEWEST_POSITIONS = 32
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step did.

    Attributes:
        loss_nats: mean per token over the step's microbatches.
        tokens: that were read.
        gradient_norm: before it was scaled down.
        taken: false where either is not finite; nothing was changed then.
    """

    loss_nats: float
    tokens: int
    gradient_norm: float
    taken: bool


class Tuner:
    """Objective, student and optimizer.

    Attributes:
        space: the ranks that the adapters can have; where there is a choice, each step draws a configuration.
        steps: optimizer steps in all; 0 where no layer has an adapter.
        learning_rate: of the adapters, before warm-up and schedule.
        updates: of the parameters, so far; a step that is not finite makes none.
    """

    def __init__(
        self,
        start: Checkpoint,
        model: ModelSpec,
        spec: TuneSpec,
        data: PreparedData,
        device: torch.device,
        listener: Listener,
    ) -> None:
        manifest = start.manifest
        self.spec = spec
        self.device = device
        self.space = manifest.elastic_ranks
        self._start = start
        self._kind = arithmetic(spec, device)
        examples = data.examples("train") if spec.objective == "task" else data.tokens("train")
        per_step = spec.batch_size * spec.gradient_accumulation_steps
        epochs = math.ceil((spec.epochs or 1) * len(examples) / per_step)
        tunable = any(layer.rank for layer in manifest.layers)
        self.steps = 0 if not tunable else epochs if spec.steps is None else spec.steps
        used, places = np.unique(batches(len(examples), self.steps, spec), return_inverse=True)
        self._batches = places.reshape(self.steps, spec.gradient_accumulation_steps, spec.batch_size)

        network = load_model(model).to(device)
        bases = {layer.name: matrix_view(network, layer.name).read() for layer in manifest.layers}
        compute_in(network, self._kind)
        own = Head.of(network, network.get_output_embeddings().weight.detach())
        sample = torch.from_numpy(data.tokens("validation").astype(np.int64))
        with self._autocast():
            self._plain = is_plain(network, own, sample.to(device))
        if self.steps and not self._plain:
            raise UnsupportedModelError(
                f"{network.config.model_type}: its logits are not its output embedding times its last hidden states, "
                "which tuning relies on; set tune.steps = 0 to convert it without tuning"
            )
        self.objective: Distillation | Answers
        if spec.objective == "task":
            chosen = [examples[index] for index in used]
            self.objective = Answers(chosen, data.examples("validation"), spec, device, self._autocast)
        else:
            train = torch.from_numpy(data.tokens("train").astype(np.int64))[used]
            self.objective = Distillation(
                network, own, train, sample, spec, model, self._kind, self._autocast, listener, taught=self.steps > 0
            )
        fixed = () if spec.zero_point_learning_rate else ("zero_point",)
        self.student = Student(network, start, bases, self._kind, fixed=fixed)
        if spec.gradient_checkpointing:
            self.student.checkpoint_gradients()
        self._student_head = self.student.head
        self.begin_anew(spec.learning_rate, self.steps)

    def begin_anew(self, learning_rate: float, steps: int) -> None:
        """Go back to the starting point, with a learning rate of the adapters and a schedule over so many steps."""
        self.learning_rate = learning_rate
        self.updates = 0
        self._horizon = steps
        self.student.load(self._start.adapters)
        self._prepare_step(0)
        self._optimizer = self._made_optimizer()
        self._base_rates = [group["lr"] for group in self._optimizer.param_groups]
        trained = self.student.trained if self.spec.ema_decay else {}
        self._averages = {key: value.detach().clone() for key, value in trained.items()}

    def _made_optimizer(self) -> torch.optim.AdamW:
        spec, trained = self.spec, self.student.trained
        scale_rate = self.learning_rate / 10 if spec.scale_learning_rate is None else spec.scale_learning_rate
        adapters = [value for key, value in trained.items() if ".lora_" in key]
        zero_points = [value for key, value in trained.items() if key.endswith(".zero_point")]
        others = {id(value) for value in (*adapters, *zero_points)}
        ranges = [value for value in trained.values() if id(value) not in others]
        groups = [
            {"name": "adapters", "params": adapters, "lr": self.learning_rate, "weight_decay": spec.weight_decay},
            {"name": "scales", "params": ranges, "lr": scale_rate, "weight_decay": 0.0},
            {
                "name": "zero_points",
                "params": zero_points,
                "lr": spec.zero_point_learning_rate,
                "weight_decay": 0.0,
            },
        ]
        return torch.optim.AdamW([group for group in groups if group["params"]] or [{"params": [torch.zeros(0)]}])

    def peak_memory_bytes(self) -> int | None:
        """The most that was in use so far: on a GPU what was allocated there, else the process's resident memory; None
        where the operating system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if resource else None

    @property
    def learning_rates(self) -> dict[str, float]:
        """Of the step that was taken last, by group."""
        return {str(group.get("name")): float(group["lr"]) for group in self._optimizer.param_groups}

    def step(self, index: int) -> StepResult:
        """One optimizer step; one whose loss or gradient is not finite changes nothing."""
        spec = self.spec
        for group, rate in zip(self._optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = rate * spec.learning_rate_factor(index, self._horizon)
        microbatches: list[list[int]] = self._batches[index].tolist()
        weight = sum(map(self.objective.weight, microbatches))
        total = 0.0
        for indices in microbatches:
            loss = self.objective.loss(self.student.network, self._student_head, indices, weight)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self.student.backward_through_quantizers()
        trained = [value for value in self.student.trained.values() if value.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(trained, spec.max_gradient_norm))
        taken = math.isfinite(total) and math.isfinite(norm)
        if taken:
            self._optimizer.step()
            self.updates += 1
            self._average()
        self.student.drop_gradients()
        if taken or self.space.is_choice:
            self._prepare_step(index + 1)
        tokens = sum(map(self.objective.tokens, microbatches))
        return StepResult(loss_nats=total, tokens=tokens, gradient_norm=norm, taken=taken)

    def configuration(self, index: int) -> Configuration:
        """The ranks of a step, drawn at random; they follow from the seed and the step."""
        return self.space.draw(self.spec.seed, index)

    def _prepare_step(self, index: int) -> None:
        """Set the weights to what the next step sees of the parameters."""
        self._next_step = index
        if self.space.is_choice:
            self.student.activate(self.space.by_layer(self.configuration(index)))
        self.student.quantize_weights()

    @torch.no_grad()
    def validate(self) -> float:
        """The objective's figure, in nats, of what would be kept; with the median ranks where there is a choice.

        NaN for a model that can't be tuned.
        """
        if not self._plain:
            return math.nan
        with self.settled():
            return self.objective.validation(self.student.network, self._student_head)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Within, parameters and ranks are what is kept of them: moving averages and the median ranks, where there are
        any."""
        choice = self.space.is_choice
        if not self._averages and not choice:
            yield
            return
        present = {key: value.detach().clone() for key, value in self.student.trained.items()} if self._averages else {}
        self.student.assign(self._averages)
        if choice:
            self.student.activate(self.space.by_layer(self.space.median))
        self.student.quantize_weights()
        try:
            yield
        finally:
            self.student.assign(present)
            self._prepare_step(self._next_step)

    def kept(self) -> dict[str, NDArray[np.generic]]:
        """What a checkpoint of the present step holds, by name."""
        with self.settled():
            return {key: value.cpu().numpy().copy() for key, value in self.student.stored().items()}

    @torch.no_grad()
    def take_up(self, values: Mapping[str, NDArray[np.float32]], ranks: Mapping[str, int]) -> None:
        """Set the student to parameters that were kept, with ranks by layer."""
        self.student.load(values)
        self.use_ranks(ranks)

    def use_ranks(self, ranks: Mapping[str, int]) -> None:
        """Let the student's adapters have these ranks, by layer."""
        self.student.activate(ranks)
        self.student.quantize_weights()

    @property
    def validation_examples(self) -> int:
        """Of the task."""
        assert isinstance(self.objective, Answers)
        return self.objective.validation_examples

    def score(self, indices: Sequence[int]) -> float:
        """Mean -log p(token) of the answers of some validation examples, of the student as it is."""
        assert isinstance(self.objective, Answers)
        return self.objective.score(self.student.network, self._student_head, indices)

    @torch.no_grad()
    def changes(self) -> dict[str, float]:
        """Shares of the codes, scales and zero points that are not those of the starting point.

        Of the parameters as they are, not of their averages, and with the ranks of the next step.
        """
        flipped = dict.fromkeys(("codes", "scales", "zero_points"), 0)
        counted = dict.fromkeys(flipped, 0)
        adapters = self._start.adapters
        for name, quantizer in self.student.quantizers.items():
            if not quantizer.layer.rank:
                continue
            starting = load_quantizer(quantizer.layer, adapters).to(self.device)
            starting.active_rank = quantizer.active_rank
            former = starting.quantize(self.student.base_weights[name])
            present = quantizer.quantize(self.student.base_weights[name])
            for key, before, now in (
                ("codes", former.codes, present.codes),
                ("scales", former.scale, present.scale),
                ("zero_points", former.zero_point, present.zero_point),
            ):
                if before is not None and now is not None:
                    flipped[key] += int((before != now).sum())
                    counted[key] += before.numel()
        return {f"{key}_moved": flipped[key] / counted[key] for key in flipped if counted[key]}

    @torch.no_grad()
    def reference(self, tokens: NDArray[np.int32]) -> dict[str, NDArray[np.generic]]:
        """What the student, as its parameters are now, says of the first tokens: `token_ids` (sequences, length) int32
        and `logits` (sequences, length, vocabulary), computed in float32 whatever the precision of the tuning.

        The student is in float32 from here on.
        """
        self.student.in_float32()
        network = self.student.network
        positions = max(_FEWEST_POSITIONS, _REFERENCE_ELEMENTS // network.config.get_text_config().vocab_size)
        length = min(tokens.shape[1], positions, _REFERENCE_LENGTH)
        sample = tokens[: positions // length, :length]
        ids = torch.from_numpy(sample.astype(np.int64)).to(self.device)
        logits = [network(input_ids=row[None], use_cache=False).logits.float().cpu().numpy() for row in ids]
        return {"token_ids": sample, "logits": np.concatenate(logits)}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._kind == torch.bfloat16)

    def _average(self) -> None:
        """Moving averages with a decay that rises from 0.1, so that the start is soon forgotten."""
        decay = min(self.spec.ema_decay, self.updates / (9 + self.updates))
        for key, average in self._averages.items():
            average.lerp_(self.student.trained[key].detach(), 1 - decay)

    def state(self) -> dict[str, NDArray[np.generic]]:
        """Parameters, the optimizer's moments and the averages, by name."""
        tensors = {key: value.detach() for key, value in self.student.trained.items()}
        for key, value in self.student.trained.items():
            moments = self._optimizer.state.get(value, {})
            tensors |= {f"{name}/{key}": moments[name] for name in _MOMENTS if name in moments}
        tensors |= {f"average/{key}": value for key, value in self._averages.items()}
        return {key: value.cpu().numpy().copy() for key, value in tensors.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, NDArray[np.generic]], step: int, updates: int) -> None:
        """Go on from a state saved after so many steps and updates.

        Raises:
            KeyError: the state lacks a tensor; nothing was changed.
        """
        wanted = [*self.student.trained, *(f"average/{key}" for key in self._averages)]
        if updates:
            wanted += [f"{name}/{key}" for name in _MOMENTS for key in self.student.trained]
        values = {key: torch.from_numpy(np.array(tensors[key])).to(self.device) for key in wanted}
        self.student.assign({key: values[key] for key in self.student.trained})
        for key, average in self._averages.items():
            average.copy_(values[f"average/{key}"])
        if updates:
            for key, parameter in self.student.trained.items():
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(updates)),
                    **{name: values[f"{name}/{key}"] for name in _MOMENTS},
                }
        self.updates = updates
        self._prepare_step(step)


def arithmetic(spec: TuneSpec, device: torch.device) -> torch.dtype:
    """What products of matrices are computed in: bfloat16 where it was asked for, or where the device is fast at it."""
    if spec.precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[spec.precision]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return torch.bfloat16 if fast else torch.float32


def batches(examples: int, steps: int, spec: TuneSpec) -> NDArray[np.int64]:
    """Which examples each step reads, (steps, microbatches, batch size): every epoch in an order of its own, which
    follows from the seed alone."""
    per_step = spec.batch_size * spec.gradient_accumulation_steps
    epochs = range(-(-steps * per_step // examples))
    orders = [np.random.default_rng((spec.seed, epoch)).permutation(examples) for epoch in epochs]
    drawn = np.concatenate(orders)[: steps * per_step] if orders else np.zeros(0, dtype=np.int64)
    return drawn.reshape(steps, spec.gradient_accumulation_steps, spec.batch_size)
