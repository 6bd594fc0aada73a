"""Teacher-forced divergence of next-token distributions, as llama.cpp's `perplexity --kl-divergence` reports it.

The models run in lockstep on the same tokens; of a batch only per-token figures are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ovexport.artifacts import IR
from ovexport.graph import read_graph
from ovexport.progress import Listener, Progress
from ovexport.reports import Divergence
from ovexport.runtime import LogitsRunner

Floats = NDArray[np.float32]
HISTOGRAM_EDGES_NATS = tuple(float(edge) for edge in np.logspace(-9, 2, 67))
_LARGEST_LOGITS = 2**26


@dataclass(slots=True)
class TokenFigures:
    """Per scored token, (sequences, length - 1): the model's negative log-likelihood of the true token in nats, and
    against the reference the KL divergence in nats, whether the likeliest token is the same, and the change of the
    true token's probability."""

    nll: list[Floats] = field(default_factory=list)
    kl: list[NDArray[np.float64]] = field(default_factory=list)
    same_top1: list[NDArray[np.bool_]] = field(default_factory=list)
    probability_change: list[Floats] = field(default_factory=list)

    def joined(self, name: str) -> NDArray[np.float64]:
        """All batches of a figure, (sequences, length - 1)."""
        return np.concatenate(getattr(self, name)).astype(np.float64)


def compare(
    models: Mapping[str, IR], reference: str, tokens: NDArray[np.int32], batch_size: int, listener: Listener
) -> tuple[dict[str, TokenFigures], dict[str, dict[str, str]]]:
    """Run the models in lockstep over the sequences.

    Args:
        tokens: (sequences, length).

    Returns:
        Each model's figures, and its runtime properties as read back.
    """
    runners = {name: LogitsRunner(read_graph(ir), str(ir.path)) for name, ir in models.items()}
    figures = {name: TokenFigures() for name in models}
    begin = 0
    while begin < len(tokens):
        part = tokens[begin : begin + batch_size].astype(np.int64)
        expected = log_softmax(runners[reference](part)[:, :-1])
        if part.size * expected.shape[-1] > _LARGEST_LOGITS and batch_size > 1:
            batch_size = max(1, _LARGEST_LOGITS // (part.shape[1] * expected.shape[-1]))
            continue
        for name, runner in runners.items():
            actual = expected if name == reference else log_softmax(runner(part)[:, :-1])
            _add(figures[name], expected, actual, part[:, 1:], same=name == reference)
        begin += len(part)
        listener(Progress(task="divergence", done=begin, total=len(tokens)))
    return figures, {name: runner.properties for name, runner in runners.items()}


def log_softmax(logits: Floats) -> Floats:
    """Logarithm of the softmax over the last axis, float32."""
    shifted: Floats = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def token_kl(reference: Floats, candidate: Floats) -> NDArray[np.float64]:
    """KL(reference ‖ candidate) of every token, in nats.

    Args:
        reference: log-probabilities, (…, vocabulary), float32.
        candidate: log-probabilities of the same shape.

    Returns:
        The shape without its last axis, not negative but for rounding.

    Raises:
        ValueError: the shapes differ.

    Source: llama.cpp's `perplexity --kl-divergence`, which averages the same quantity.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {candidate.shape}")
    divergence: NDArray[np.float64] = np.sum(np.exp(reference) * (reference - candidate), axis=-1, dtype=np.float64)
    return divergence


def summarize(figures: TokenFigures) -> tuple[Divergence, tuple[int, ...]]:
    """Order statistics over all tokens, and the histogram over HISTOGRAM_EDGES_NATS (values outside: end bins)."""
    kl = figures.joined("kl").reshape(-1)
    change = figures.joined("probability_change").reshape(-1)
    p90, p95, p99, p999 = np.percentile(kl, [90, 95, 99, 99.9])
    inside = np.clip(kl, HISTOGRAM_EDGES_NATS[0], HISTOGRAM_EDGES_NATS[-1])
    return (
        Divergence(
            kl_mean_nats=float(kl.mean()),
            kl_median_nats=float(np.median(kl)),
            kl_p90_nats=float(p90),
            kl_p95_nats=float(p95),
            kl_p99_nats=float(p99),
            kl_p999_nats=float(p999),
            kl_maximum_nats=float(kl.max()),
            kl_standard_error_nats=float(kl.std(ddof=1) / np.sqrt(len(kl))),
            same_top1=float(figures.joined("same_top1").mean()),
            true_token_probability_change_mean=float(change.mean()),
            true_token_probability_change_rms=float(np.sqrt((change**2).mean())),
        ),
        tuple(int(count) for count in np.histogram(inside, HISTOGRAM_EDGES_NATS)[0]),
    )


def perplexity(figures: TokenFigures) -> float:
    """exp of the mean negative log-likelihood per token."""
    return float(np.exp(figures.joined("nll").mean()))


def word_perplexity(figures: TokenFigures, length: int, words: int) -> float | None:
    """exp(total negative log-likelihood / words), as lm-evaluation-harness's wikitext has it.

    The first token of a sequence has no prediction; it is counted with the mean of the others.
    """
    nll = figures.joined("nll")
    return float(np.exp(nll.mean() * nll.shape[0] * length / words)) if words else None


def recovered_gap(
    twin: TokenFigures, tuned: TokenFigures, seed: int, resamples: int = 2000
) -> tuple[float, tuple[float, float]]:
    """1 - KL(tuned) / KL(twin), and its 95 % interval by bootstrap over sequences, pair by pair."""
    before, after = twin.joined("kl").mean(axis=1), tuned.joined("kl").mean(axis=1)
    chosen = np.random.default_rng(seed).integers(0, len(before), (resamples, len(before)))
    gaps = 1 - after[chosen].mean(axis=1) / before[chosen].mean(axis=1)
    low, high = np.percentile(gaps, [2.5, 97.5])
    return float(1 - after.mean() / before.mean()), (float(low), float(high))


def _add(figures: TokenFigures, expected: Floats, actual: Floats, true: NDArray[np.int64], *, same: bool) -> None:
    index = true[..., None]
    own = np.take_along_axis(actual, index, -1)[..., 0]
    figures.nll.append(-own)
    if same:
        return
    figures.kl.append(token_kl(expected, actual))
    figures.same_top1.append(expected.argmax(-1) == actual.argmax(-1))
    figures.probability_change.append(np.exp(own) - np.exp(np.take_along_axis(expected, index, -1)[..., 0]))
