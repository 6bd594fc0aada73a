"""The objective "task": the right answers to a task's questions."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.artifacts import Example, PreparedData
from ovexport.models.device import Compute
from ovexport.models.head import Head, hidden_states
from ovexport.objectives.loss import cross_entropy
from ovexport.objectives.objective import Material, objectives
from ovexport.recipe import TuneSpec


@objectives.register("task")
class Answers:
    """-log p(token) of the answers; with loss_on = "everything" of the questions' tokens as well, as text is learned.
    Validation is of the answers alone."""

    figure = "validation_nll_nats"

    def __init__(
        self, train: Sequence[Example], validation: Sequence[Example], spec: TuneSpec, compute: Compute
    ) -> None:
        self._train = train
        self._validation = validation
        self._learns_everything = spec.loss_on == "everything"
        self._batch_size = spec.batch_size
        self._compute = compute
        self.validation_examples = len(validation)

    @classmethod
    def train_examples(cls, data: PreparedData) -> int:
        """As ObjectiveType."""
        return len(data.examples("train"))

    @classmethod
    def build(cls, material: Material) -> "Answers":
        """As ObjectiveType."""
        examples = material.data.examples("train")
        train = [examples[index] for index in material.train]
        return cls(train, material.data.examples("validation"), material.spec, material.compute)

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
        return cross_entropy(self._hidden(network, ids), self._moved(following), head, tokens=weight)

    @torch.no_grad()
    def score(self, network: PreTrainedModel, head: Head, indices: Sequence[int]) -> float:
        """-log p(token) of the answers of these validation examples."""
        exact = head.to(torch.float32)
        ordered = sorted((self._validation[index] for index in indices), key=lambda example: len(example.tokens))
        total, count = 0.0, 0
        for begin in range(0, len(ordered), self._batch_size):
            examples = ordered[begin : begin + self._batch_size]
            ids, following = _padded(examples, [example.answer for example in examples])
            total += float(cross_entropy(self._hidden(network, ids), self._moved(following), exact, tokens=1))
            count += int((following >= 0).sum())
        return total / count

    def _first(self, example: Example) -> int:
        """Index of the first token that is learned; nothing comes before the very first."""
        return 1 if self._learns_everything else example.answer

    def _hidden(self, network: PreTrainedModel, ids: Tensor) -> Tensor:
        with self._compute.autocast():
            return hidden_states(network, self._moved(ids)).float()

    def _moved(self, values: Tensor) -> Tensor:
        return values.to(self._compute.device)


def _padded(examples: Sequence[Example], firsts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Tokens, (examples, length), and the token that follows each where it is learned, else -1.

    Padding stands behind the tokens, where no token of a causal model looks.
    """
    longest = max(len(example.tokens) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    following = torch.full_like(ids, -1)
    for row, (example, first) in enumerate(zip(examples, firsts, strict=True)):
        tokens: NDArray[np.int64] = example.tokens.astype(np.int64)
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        following[row, first - 1 : len(tokens) - 1] = torch.from_numpy(tokens[first:])
    return ids, following
