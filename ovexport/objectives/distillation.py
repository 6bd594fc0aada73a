"""The objective "distillation": the uncompressed model's next-token distribution on text."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.artifacts import PreparedData
from ovexport.models.architecture import compute_in
from ovexport.models.head import Head, hidden_states
from ovexport.models.loading import load_model
from ovexport.objectives.loss import Loss, distillation, divergence
from ovexport.objectives.objective import Material, objectives
from ovexport.objectives.teacher import LiveTeacher, Teacher, cached_teacher


@objectives.register("distillation")
class Distillation:
    """KL(uncompressed ‖ student), or the mixture of losses that the recipe asks for; validated by the divergence alone.

    The uncompressed model runs once on the validation text while this is made, and once on the training text, as
    ovexport.objectives.teacher says.
    """

    figure = "validation_kl_nats"

    def __init__(self, material: Material) -> None:
        data, base = material.data, material.base
        self._compute = material.compute
        self._device = material.compute.device
        self._head = base.head
        self._loss = Loss.of(material.spec)
        self._batch_size = material.spec.batch_size
        self._train = torch.from_numpy(data.tokens("train").astype(np.int64)[material.train])
        self._teacher = _teacher(material, self._train) if len(self._train) else None
        self._validation = torch.from_numpy(data.tokens("validation").astype(np.int64))
        with torch.no_grad(), self._compute.autocast():
            parts = [
                hidden_states(base.network, part.to(self._device)).float()
                for part in torch.split(self._validation, self._batch_size)
            ]
        self._states = torch.cat(parts)
        self.validation_examples = len(self._validation)

    @classmethod
    def train_examples(cls, data: PreparedData) -> int:
        """As ObjectiveType."""
        return len(data.tokens("train"))

    @classmethod
    def build(cls, material: Material) -> "Distillation":
        """As ObjectiveType."""
        return cls(material)

    def tokens(self, indices: Sequence[int]) -> int:
        """As Objective."""
        return len(indices) * self._train.shape[1]

    weight = tokens

    def loss(self, network: PreTrainedModel, head: Head, indices: Sequence[int], weight: int) -> Tensor:
        """As Objective."""
        assert self._teacher is not None
        ids = self._train[list(indices)].to(self._device)
        taught = self._teacher.states(list(indices)).to(self._device)
        with self._compute.autocast():
            hidden = hidden_states(network, ids)
        return distillation(hidden.float(), taught, ids, head, self._head, self._loss, tokens=weight)

    @torch.no_grad()
    def score(self, network: PreTrainedModel, head: Head, indices: Sequence[int]) -> float:
        """KL(uncompressed ‖ student) per token of these validation sequences."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        exact, exact_own = head.to(torch.float32), self._head.to(torch.float32)
        for chosen in torch.split(torch.tensor(list(indices), dtype=torch.int64), self._batch_size):
            with self._compute.autocast():
                hidden = hidden_states(network, self._validation[chosen].to(self._device))
            total += divergence(hidden, self._states[chosen.to(self._device)], exact, exact_own)
        return float(total) / (len(indices) * self._validation.shape[1])


def _teacher(material: Material, train: Tensor) -> Teacher:
    """The cached hidden states of the training text, or the model itself if they do not fit."""
    spec, model, base, compute = material.spec, material.model, material.base, material.compute
    cached = cached_teacher(
        base.network,
        train,
        compute.autocast(),
        width=base.head.weight.shape[1],
        batch_size=spec.batch_size,
        limit_bytes=0 if model.trust_remote_code else spec.teacher_cache_gb * 1e9,  # code has no digest
        listener=material.listener,
    )
    if cached is not None:
        return cached
    live = load_model(model).to(compute.device)
    compute_in(live, compute.dtype)
    return LiveTeacher(live, train, compute.autocast())
