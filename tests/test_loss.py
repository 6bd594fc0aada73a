"""The chunked distillation loss and its written-out gradient, against autograd of the plain formula in float64."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from ovexport.models.head import Head
from ovexport.objectives import loss as loss_module
from ovexport.objectives.loss import Loss, distillation, divergence

VOCABULARY, WIDTH = 50, 8


def heads(**changes) -> tuple[Head, Head]:
    generator = torch.Generator().manual_seed(0)
    options = {"bias": None, "factor": 1.0, "cap": None} | changes
    weights = [torch.randn(VOCABULARY, WIDTH, generator=generator) for _ in range(2)]
    return Head(weights[0], **options), Head(weights[1], **options)


def states(seed: int) -> torch.Tensor:
    return torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(seed))


def plain(hidden, taught, ids, student: Head, teacher: Head, loss: Loss) -> torch.Tensor:
    """The formula of the module's docstring, in float64."""

    def logits(head: Head, value: torch.Tensor) -> torch.Tensor:
        out = value @ head.weight.double().T
        if head.bias is not None:
            out = out + head.bias.double()
        out = out * head.factor
        return out if head.cap is None else head.cap * torch.tanh(out / head.cap)

    z, t = logits(student, hidden), logits(teacher, taught.double())
    temperature = loss.temperature
    q, p = (z / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    forward = kl_div(q, p, log_target=True, reduction="sum")
    reverse = kl_div(p, q, log_target=True, reduction="sum")
    distilled = temperature**2 * ((1 - loss.reverse_share) * forward + loss.reverse_share * reverse)
    following = cross_entropy(z[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1), reduction="sum")
    return (1 - loss.cross_entropy_share) * distilled + loss.cross_entropy_share * following


LOSSES = [
    Loss(),
    Loss(temperature=2.0),
    Loss(reverse_share=1.0),
    Loss(reverse_share=0.3, temperature=1.5),
    Loss(cross_entropy_share=0.25),
    Loss(cross_entropy_share=0.5, reverse_share=0.5, temperature=3.0),
]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("head", [{}, {"cap": 5.0}, {"factor": 0.25}, {"bias": torch.linspace(-1, 1, VOCABULARY)}])
def test_value_and_gradient_are_those_of_the_plain_formula(loss: Loss, head: dict, monkeypatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", {"cpu": 1})
    student, teacher = heads(**head)
    ids = torch.randint(0, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    ours, exact = states(1).requires_grad_(), states(1).double().requires_grad_()
    value = distillation(ours, states(2), ids, student, teacher, loss, tokens=12)
    expected = plain(exact, states(2), ids, student, teacher, loss) / 12
    (3 * value).backward()
    (3 * expected).backward()
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_the_divergence_is_the_forward_one_whatever_is_tuned_for() -> None:
    student, teacher = heads()
    expected = plain(states(1).double(), states(2), torch.zeros(2, 6, dtype=torch.long), student, teacher, Loss())
    assert float(divergence(states(1), states(2), student, teacher)) == pytest.approx(float(expected), rel=1e-5)


def test_no_chunk_holds_more_logits_than_it_may() -> None:
    for tokens, vocabulary in ((4096, 8192), (512, 49152), (300, 260_000), (100_000, 105), (1, 20_000_000)):
        parts = list(loss_module.chunks(torch.zeros(tokens, 1), vocabulary))
        assert sum(len(range(*part.indices(tokens))) for part in parts) == tokens
        largest = max(len(range(*part.indices(tokens))) for part in parts)
        assert largest == 1 or largest * vocabulary <= loss_module.LARGEST_CHUNK_ELEMENTS
