"""What is tuned for: the uncompressed model's distribution on text, or the answers of a task.

Both say what a microbatch costs, with its gradient, and how good the student is on the validation split.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.artifacts import Example
from ovexport.models.architecture import compute_in
from ovexport.models.head import Head, hidden_states
from ovexport.models.loading import load_model
from ovexport.objectives.loss import Loss, cross_entropy, distillation, divergence
from ovexport.objectives.teacher import LiveTeacher, Teacher, cached_teacher
from ovexport.progress import Listener
from ovexport.recipe import ModelSpec, TuneSpec

Autocast = Callable[[], torch.autocast]


class Objective(Protocol):
    """What tuning does better and better.

    Attributes:
        figure: name of the validation's figure, in nats; less is better.
    """

    figure: str

    def tokens(self, indices: Sequence[int]) -> int:
        """How many tokens of these examples are read."""

    def weight(self, indices: Sequence[int]) -> int:
        """How many tokens of these examples have a loss."""

    def loss(self, network: PreTrainedModel, head: Head, indices: Sequence[int], weight: int) -> Tensor:
        """The loss of a microbatch, summed over its tokens and divided by the weight of the whole step."""

    def validation(self, network: PreTrainedModel, head: Head) -> float:
        """Mean per token of the validation split, in nats, with logits in float32."""


class Distillation:
    """The uncompressed model's next-token distribution.

    Args:
        network: the model before it becomes the student.
        head: the model's own.
        train, validation: (sequences, length) int64.
        kind: of the products of matrices.
        taught: whether there will be steps; else it only validates.
    """

    figure = "validation_kl_nats"

    def __init__(
        self,
        network: PreTrainedModel,
        head: Head,
        train: Tensor,
        validation: Tensor,
        spec: TuneSpec,
        model: ModelSpec,
        kind: torch.dtype,
        autocast: Autocast,
        listener: Listener,
        *,
        taught: bool,
    ) -> None:
        self._device = network.device
        self._autocast = autocast
        self._head = head
        self._loss = Loss.of(spec)
        self._train = train
        self._teacher: Teacher | None = None
        if taught:
            self._teacher = _teacher(network, head, train, spec, model, kind, autocast, listener)
        self._validation = torch.split(validation, spec.batch_size)
        with torch.no_grad(), autocast():
            self._states = [hidden_states(network, part.to(self._device)).float() for part in self._validation]

    def tokens(self, indices: Sequence[int]) -> int:
        """As Objective."""
        return len(indices) * self._train.shape[1]

    weight = tokens

    def loss(self, network: PreTrainedModel, head: Head, indices: Sequence[int], weight: int) -> Tensor:
        """As Objective."""
        assert self._teacher is not None
        ids = self._train[list(indices)].to(self._device)
        taught = self._teacher.states(list(indices)).to(self._device)
        with self._autocast():
            hidden = hidden_states(network, ids)
        return distillation(hidden.float(), taught, ids, head, self._head, self._loss, tokens=weight)

    @torch.no_grad()
    def validation(self, network: PreTrainedModel, head: Head) -> float:
        """KL(uncompressed ‖ student)."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        exact = self._head.to(torch.float32)
        for ids, taught in zip(self._validation, self._states, strict=True):
            with self._autocast():
                hidden = hidden_states(network, ids.to(self._device))
            total += divergence(hidden, taught, head.to(torch.float32), exact)
        return float(total) / sum(part.numel() for part in self._validation)


class Answers:
    """The right answers to a task's questions.

    Args:
        loss_on: "answer", or "everything": the question's tokens as well, as text is learned. Validation is of the
            answers alone.
    """

    figure = "validation_nll_nats"

    def __init__(
        self,
        train: Sequence[Example],
        validation: Sequence[Example],
        spec: TuneSpec,
        device: torch.device,
        autocast: Autocast,
    ) -> None:
        self._train = train
        self._validation_examples = validation
        self._everything = spec.loss_on == "everything"
        self._batch_size = spec.batch_size
        self._device = device
        self._autocast = autocast

    def tokens(self, indices: Sequence[int]) -> int:
        """As Objective."""
        return sum(len(self._train[index].tokens) for index in indices)

    def weight(self, indices: Sequence[int]) -> int:
        """As Objective."""
        return sum(len(self._train[index].tokens) - self._first(self._train[index]) for index in indices)

    def loss(self, network: PreTrainedModel, head: Head, indices: Sequence[int], weight: int) -> Tensor:
        """-log p(token) of the tokens that are learned."""
        examples = [self._train[index] for index in indices]
        ids, following = _padded(examples, [self._first(example) for example in examples])
        return cross_entropy(self._hidden(network, ids), following.to(self._device), head, tokens=weight)

    @torch.no_grad()
    def validation(self, network: PreTrainedModel, head: Head) -> float:
        """-log p(token) of the answers."""
        return self.score(network, head, range(len(self._validation_examples)))

    @torch.no_grad()
    def score(self, network: PreTrainedModel, head: Head, indices: Sequence[int]) -> float:
        """The same of some of the validation examples."""
        exact = head.to(torch.float32)
        ordered = sorted((self._validation_examples[index] for index in indices), key=lambda one: len(one.tokens))
        total, count = 0.0, 0
        for begin in range(0, len(ordered), self._batch_size):
            examples = ordered[begin : begin + self._batch_size]
            ids, following = _padded(examples, [example.answer for example in examples])
            total += float(cross_entropy(self._hidden(network, ids), following.to(self._device), exact, tokens=1))
            count += int((following >= 0).sum())
        return total / count

    @property
    def validation_examples(self) -> int:
        """How many there are."""
        return len(self._validation_examples)

    def _first(self, example: Example) -> int:
        """Index of the first token that is learned; nothing comes before the very first."""
        return 1 if self._everything else example.answer

    def _hidden(self, network: PreTrainedModel, ids: Tensor) -> Tensor:
        with self._autocast():
            return hidden_states(network, ids.to(self._device)).float()


def _padded(examples: Sequence[Example], firsts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Tokens, (examples, length), and the token that follows each where it is learned, else -1.

    What pads stands behind, where no token of a causal model looks.
    """
    longest = max(len(example.tokens) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    following = torch.full_like(ids, -1)
    for row, (example, first) in enumerate(zip(examples, firsts, strict=True)):
        tokens: NDArray[np.int64] = example.tokens.astype(np.int64)
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        following[row, first - 1 : len(tokens) - 1] = torch.from_numpy(tokens[first:])
    return ids, following


def _teacher(
    network: PreTrainedModel,
    head: Head,
    train: Tensor,
    spec: TuneSpec,
    model: ModelSpec,
    kind: torch.dtype,
    autocast: Autocast,
    listener: Listener,
) -> Teacher:
    cached = cached_teacher(
        network,
        train,
        autocast(),
        width=head.weight.shape[1],
        batch_size=spec.batch_size,
        limit_bytes=0 if model.trust_remote_code else spec.teacher_cache_gb * 1e9,  # code has no digest
        listener=listener,
    )
    if cached is not None:
        return cached
    live = load_model(model).to(network.device)
    compute_in(live, kind)
    return LiveTeacher(live, train, autocast())
