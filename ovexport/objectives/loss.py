"""The losses, a few tokens at a time: never batch × length × vocabulary in memory.

That of an answer's token is -log q₁(token). Distillation's of a token, teacher p and student q over the vocabulary,
both at temperature T:

    (1 - c) · T² · [(1 - r) · KL(p ‖ q) + r · KL(q ‖ p)]  -  c · log q₁(next token)

with c the share of the cross-entropy (at temperature 1) and r that of the reverse divergence. T² keeps the gradient's
size (Hinton, Vinyals and Dean, arXiv:1503.02531). The gradient with respect to the student's logits is written out:
T · (q - p) for the forward part, T · q · (log q - log p - KL(q ‖ p)) for the reverse one, q₁ - 1[next] for the last.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ovexport.models.head import Head
from ovexport.recipe import TuneSpec

CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
CHUNK_TOKENS = 128
LARGEST_CHUNK_ELEMENTS = 2**23


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Which loss, see the module.

    Attributes:
        reverse_share: r.
        cross_entropy_share: c.
    """

    temperature: float = 1.0
    reverse_share: float = 0.0
    cross_entropy_share: float = 0.0

    @classmethod
    def of(cls, spec: TuneSpec) -> "Loss":
        """The loss that a recipe asks for."""
        return cls(
            temperature=spec.temperature,
            reverse_share=spec.reverse_kl_share,
            cross_entropy_share=spec.cross_entropy_share,
        )

    def gradient(self, teacher: Tensor, student: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """Loss summed over the tokens, and its gradient with respect to the student's logits.

        Args:
            teacher, student: logits, (tokens, vocabulary) float32; the teacher's are overwritten.
            following: the next token of each, (tokens,) int64; -1 where there is none.
        """
        temperature, reverse, entropy = self.temperature, self.reverse_share, self.cross_entropy_share
        log_p = teacher.div_(temperature) if temperature != 1 else teacher
        log_p = log_p.sub_(log_p.logsumexp(-1, keepdim=True))
        log_q = student / temperature if temperature != 1 else student
        log_q = log_q - log_q.logsumexp(-1, keepdim=True)
        q = log_q.exp()
        difference = log_q.sub_(log_p)
        p = log_p.exp_()
        total = -(1 - reverse) * temperature**2 * torch.linalg.vecdot(p, difference).sum()
        gradient = (q - p) if reverse else p.neg_().add_(q)
        gradient *= (1 - reverse) * temperature
        if reverse:
            backwards = torch.linalg.vecdot(q, difference).unsqueeze(-1)
            total += reverse * temperature**2 * backwards.sum()
            gradient += difference.sub_(backwards).mul_(q).mul_(reverse * temperature)
        if entropy:
            total, gradient = total * (1 - entropy), gradient.mul_(1 - entropy)
            known = following >= 0
            rows, targets = known.nonzero()[:, 0], following[known]
            log_next = student[known].log_softmax(-1)
            total -= entropy * log_next[torch.arange(len(targets)), targets].sum()
            share = log_next.exp_().mul_(entropy)
            share[torch.arange(len(targets)), targets] -= entropy
            gradient.index_add_(0, rows, share)
        return total, gradient


def distillation(
    hidden: Tensor, taught: Tensor, ids: Tensor, student: Head, teacher: Head, loss: Loss, *, tokens: int
) -> Tensor:
    """The loss of a microbatch, divided by `tokens`; differentiable in `hidden`.

    Args:
        hidden: the student's hidden states, (sequences, length, hidden size).
        taught: the teacher's, of the same shape.
        ids: the tokens, (sequences, length).
        tokens: of the whole optimizer step.
    """
    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], 1).flatten()
    result: Tensor = _Distillation.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, 1), taught.flatten(0, 1), following, student, teacher, loss, tokens
    )
    return result


def cross_entropy(hidden: Tensor, following: Tensor, head: Head, *, tokens: int) -> Tensor:
    """-log q₁(next token) summed over the tokens that have a next one, divided by `tokens`; differentiable in `hidden`.

    Args:
        hidden: the student's hidden states, (sequences, length, hidden size).
        following: the next token of each, (sequences, length) int64; -1 where it is not learned.
        tokens: of the whole optimizer step.
    """
    learned = following.flatten() >= 0
    result: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden.flatten(0, 1)[learned], following.flatten()[learned], head, tokens
    )
    return result


@torch.no_grad()
def divergence(hidden: Tensor, taught: Tensor, student: Head, teacher: Head) -> Tensor:
    """KL(teacher ‖ student) summed over the tokens, in nats, whatever the loss that is tuned for."""
    hidden, taught = hidden.flatten(0, 1), taught.flatten(0, 1)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for part in chunks(hidden, len(teacher.weight)):
        log_p = teacher.logits(taught[part]).log_softmax(-1)
        difference = student.logits(hidden[part]).log_softmax(-1).sub_(log_p)
        total -= torch.linalg.vecdot(log_p.exp_(), difference).double().sum()
    return total


class _Distillation(torch.autograd.Function):
    """Loss and gradient of the hidden states in one pass over chunks of tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        taught: Tensor,
        following: Tensor,
        student: Head,
        teacher: Head,
        loss: Loss,
        tokens: int,
    ) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for part in chunks(hidden, len(teacher.weight)):
            logits = student.logits(hidden[part])
            value, slope = loss.gradient(teacher.logits(taught[part]), logits, following[part])
            gradient[part] = student.backward(slope.div_(tokens), logits)
            total += value
        ctx.save_for_backward(gradient)
        return (total / tokens).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None, None, None, None


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy and the gradient of the hidden states in one pass over chunks of tokens."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, following: Tensor, head: Head, tokens: int) -> Tensor:
        gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for part in chunks(hidden, len(head.weight)):
            logits = head.logits(hidden[part])
            slope = logits.log_softmax(-1)
            rows = torch.arange(len(slope), device=hidden.device)
            total -= slope[rows, following[part]].double().sum()
            slope = slope.exp_()
            slope[rows, following[part]] -= 1
            gradient[part] = head.backward(slope.div_(tokens), logits)
        ctx.save_for_backward(gradient)
        return (total / tokens).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None


def chunks(hidden: Tensor, vocabulary: int) -> Iterator[slice]:
    """Chunks whose logits stay in the cache; for a large vocabulary, enough tokens to pay for reading the head."""
    least = min(CHUNK_TOKENS, LARGEST_CHUNK_ELEMENTS // vocabulary)
    height = max(1, least, CHUNK_ELEMENTS[hidden.device.type] // vocabulary)
    return (slice(begin, begin + height) for begin in range(0, len(hidden), height))
