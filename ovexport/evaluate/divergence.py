"""Teacher-forced divergence of next-token distributions, as llama.cpp's `perplexity --kl-divergence` reports it.

The models run in lockstep on the same tokens; of a batch only per-token figures are kept.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ovexport.bootstrap import too_few
from ovexport.errors import ArtifactError
from ovexport.openvino.runtime import LogitsRunner
from ovexport.openvino.token_divergence import Comparator, Floats
from ovexport.progress import Listener, Progress
from ovexport.reports import Comparison, Divergence, Estimate, Interval

HISTOGRAM_EDGES_NATS = tuple(float(edge) for edge in np.logspace(-9, 2, 67))
_LARGEST_LOGITS = 2**26
_LARGEST_EXPONENT = math.log(sys.float_info.max)
_FEWEST_DOCUMENTS = 10
_RESAMPLED_AT_ONCE = 100

Verdict = Literal["lower", "higher", "tie"]


@dataclass(slots=True)
class TokenFigures:
    """Per scored token, (sequences, length - 1): the model's negative log-likelihood of the true token in nats, and
    against the reference the KL divergence in nats, whether the likeliest token is the same, and the change of the
    true token's probability."""

    nll: list[Floats] = field(default_factory=list)
    kl: list[Floats] = field(default_factory=list)
    same_top1: list[NDArray[np.bool_]] = field(default_factory=list)
    probability_change: list[Floats] = field(default_factory=list)

    def joined(self, name: str) -> Floats:
        """All batches of a figure, (sequences, length - 1)."""
        return np.concatenate(getattr(self, name)).astype(np.float64)


def compare(
    runners: Mapping[str, LogitsRunner],
    reference: str,
    tokens: NDArray[np.int32],
    batch_size: int,
    listener: Listener,
    *,
    piece: int | None = None,
    task: str = "divergence",
) -> dict[str, TokenFigures]:
    """Run the models in lockstep over the sequences.

    Args:
        tokens: (sequences, length).
        piece: at most so many tokens of a sequence in one forward pass. The runtime reads keys and values back from the
            KV cache only in the passes that follow the first one.

    Raises:
        ArtifactError: a model's vocabulary is not the reference's, or the tokens are not of it.
        UnsupportedModelError: logits are not finite.
    """
    vocabulary = _vocabulary(runners, reference, int(tokens.max()))
    comparator = Comparator(vocabulary)
    length = tokens.shape[1]
    longest = min(piece or length, max(1, _LARGEST_LOGITS // vocabulary))
    batch_size = max(1, min(batch_size, _LARGEST_LOGITS // (longest * vocabulary)))
    figures = {name: TokenFigures() for name in runners}
    for begin in range(0, len(tokens), batch_size):
        part = tokens[begin : begin + batch_size].astype(np.int64)
        batch = _compare_batch(runners, reference, part, longest, comparator)
        for name, one in batch.items():
            for field_name in ("nll", *(() if name == reference else ("kl", "same_top1", "probability_change"))):
                getattr(figures[name], field_name).append(np.concatenate(getattr(one, field_name), axis=1)[:, :-1])
        listener(Progress(task=task, done=begin + len(part), total=len(tokens)))
    return figures


def _vocabulary(runners: Mapping[str, LogitsRunner], reference: str, largest: int) -> int:
    sizes: dict[str, int] = {name: runner.vocabulary for name, runner in runners.items()}
    for name, size in sizes.items():
        if size != sizes[reference]:
            raise ArtifactError(
                f"{name}: its vocabulary has {size} tokens, that of {reference} {sizes[reference]}; compare a model "
                "with the one that it was made from"
            )
    if largest >= sizes[reference]:
        raise ArtifactError(
            f"{reference}: its vocabulary has {sizes[reference]} tokens, and the text holds token {largest}; the text "
            "was prepared with another model's tokenizer, give it with --data"
        )
    return sizes[reference]


def _compare_batch(
    runners: Mapping[str, LogitsRunner],
    reference: str,
    part: NDArray[np.int64],
    longest: int,
    comparator: Comparator,
) -> dict[str, TokenFigures]:
    """The figures of a batch, by piece; those of the last position mean nothing, as nothing comes after it."""
    following = np.concatenate([part[:, 1:], np.zeros((len(part), 1), np.int64)], axis=1)
    passes = {name: runner.pieces(part, longest) for name, runner in runners.items()}
    figures = {name: TokenFigures() for name in runners}
    others = [name for name in runners if name != reference]
    for begin in range(0, part.shape[1], longest):
        true = following[:, begin : begin + longest]
        expected = next(passes[reference])
        for name in others or [reference]:
            actual = expected if name == reference else next(passes[name])
            statistics = comparator(expected, actual, true)
            if name != reference:
                figures[name].nll.append(statistics.nll)
                figures[name].kl.append(statistics.kl)
                figures[name].same_top1.append(statistics.same_top1)
                figures[name].probability_change.append(statistics.probability_change)
        figures[reference].nll.append(statistics.reference_nll)
    return figures


@dataclass(frozen=True, slots=True, kw_only=True)
class Resampling:
    """What the bootstrap draws: documents, or sequences where the text is one running text or has few documents.

    Attributes:
        name: "documents" or "sequences".
        units: of each scored token, (sequences, length - 1), from 0 on.
    """

    name: Literal["documents", "sequences"]
    units: NDArray[np.int64]
    seed: int
    resamples: int = 2000

    @property
    def count(self) -> int:
        """How many units there are to draw from."""
        return int(self.units.max()) + 1

    @property
    def too_few(self) -> str | None:
        """Why there are no intervals; None where there are."""
        return too_few(self.count, self.name)

    @classmethod
    def of(cls, documents: NDArray[np.int32] | None, scored: tuple[int, int], seed: int) -> "Resampling":
        """By the document of each token (sequences, length), where there are enough of them."""
        sequences = np.repeat(np.arange(scored[0], dtype=np.int64)[:, None], scored[1], axis=1)
        if documents is None or len(np.unique(documents)) < _FEWEST_DOCUMENTS:
            return cls(name="sequences", units=sequences, seed=seed)
        units = np.unique(documents[:, 1:], return_inverse=True)[1].reshape(scored)
        return cls(name="documents", units=units, seed=seed)

    def means(self, *figures: Floats) -> Floats:
        """Means of the figures, each (sequences, length - 1), in every resample: (resamples, figures)."""
        count = self.count
        columns = [np.ones(self.units.size), *(figure.reshape(-1) for figure in figures)]
        sums = np.stack([np.bincount(self.units.reshape(-1), column, count) for column in columns], axis=1)
        generator = np.random.default_rng(self.seed)
        totals = np.concatenate(
            [
                generator.multinomial(count, np.full(count, 1 / count), size=_RESAMPLED_AT_ONCE) @ sums
                for _ in range(self.resamples // _RESAMPLED_AT_ONCE)
            ]
        )
        means: Floats = totals[:, 1:] / totals[:, :1]
        return means

    def interval(self, resampled: Floats) -> Interval | None:
        """The 95 % percentile interval; None where there are too few values."""
        return None if self.too_few else interval(resampled)


def interval(resampled: Floats) -> Interval:
    """The 95 % percentile interval."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(low), float(high)


def verdict(ci95: Interval | None, nothing: float) -> Verdict | None:
    """Where the interval lies; a tie, where it holds the value at which nothing differs; None without one."""
    if ci95 is None:
        return None
    if ci95[0] > nothing:
        return "higher"
    return "lower" if ci95[1] < nothing else "tie"


def summarize(
    figures: TokenFigures, reference: TokenFigures, resampling: Resampling
) -> tuple[Divergence, tuple[int, ...]]:
    """Order statistics over all tokens, and the histogram over HISTOGRAM_EDGES_NATS (values outside: end bins)."""
    per_token = figures.joined("kl")
    kl = per_token.reshape(-1)
    change = figures.joined("probability_change").reshape(-1)
    same = figures.joined("same_top1")
    p90, p95, p99, p999 = np.percentile(kl, [90, 95, 99, 99.9])
    inside = np.clip(kl, HISTOGRAM_EDGES_NATS[0], HISTOGRAM_EDGES_NATS[-1])
    own, other = figures.joined("nll"), reference.joined("nll")
    resampled = resampling.means(per_token, own - other, same)
    ratio = _ratio(own - other, resampled[:, 1], resampling)
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
            kl_mean_ci95=resampling.interval(resampled[:, 0]),
            same_top1=float(same.mean()),
            same_top1_ci95=resampling.interval(resampled[:, 2]),
            same_top1_standard_error=float(np.sqrt(same.mean() * (1 - same.mean()) / (same.size - 1))),
            perplexity_ratio=ratio,
            perplexity_verdict=verdict(ratio.ci95, 1.0)
            if ratio
            else verdict(resampling.interval(resampled[:, 1]), 0.0),
            true_token_probability_change_mean=float(change.mean()),
            true_token_probability_change_rms=float(np.sqrt((change**2).mean())),
        ),
        tuple(int(count) for count in np.histogram(inside, HISTOGRAM_EDGES_NATS)[0]),
    )


def _ratio(differences: Floats, resampled: Floats, resampling: Resampling) -> Estimate | None:
    """Of two perplexities, from the differences of log-likelihoods; None where it is more than a float holds."""
    with np.errstate(over="ignore", invalid="ignore"):
        value, ci95 = float(np.exp(differences.mean())), resampling.interval(np.exp(resampled))
    return Estimate(value=value, ci95=ci95) if np.isfinite((value, *(ci95 or ()))).all() else None


def difference(first: TokenFigures, second: TokenFigures, resampling: Resampling) -> Comparison:
    """The first model's figures less the second's."""
    differences = [first.joined(name) - second.joined(name) for name in ("kl", "nll")]
    resampled = resampling.means(*differences)
    estimates = [
        Estimate(value=float(one.mean()), ci95=resampling.interval(resampled[:, index]))
        for index, one in enumerate(differences)
    ]
    return Comparison(
        kl_mean_nats=estimates[0],
        kl_verdict=verdict(estimates[0].ci95, 0.0),
        nll_mean_nats=estimates[1],
        nll_verdict=verdict(estimates[1].ci95, 0.0),
    )


def perplexity(figures: TokenFigures) -> float | None:
    """exp of the mean negative log-likelihood per token; None where that is more than a float holds."""
    return _exponential(figures.joined("nll").mean())


def word_perplexity(figures: TokenFigures, length: int, words: int) -> float | None:
    """exp(total negative log-likelihood / words), as lm-evaluation-harness's wikitext has it.

    The first token of a sequence has no prediction; it is counted with the mean of the others. None where there are no
    words, or the figure is more than a float holds.
    """
    nll = figures.joined("nll")
    return _exponential(nll.mean() * nll.shape[0] * length / words) if words else None


def _exponential(exponent: float) -> float | None:
    """exp, or None where it is more than a float holds."""
    return math.exp(exponent) if exponent < _LARGEST_EXPONENT else None


def recovered_gap(twin: TokenFigures, tuned: TokenFigures, resampling: Resampling) -> tuple[float, Interval | None]:
    """1 - KL(tuned) / KL(twin), and its 95 % interval by bootstrap, pair by pair."""
    before, after = twin.joined("kl"), tuned.joined("kl")
    resampled = resampling.means(before, after)
    return float(1 - after.mean() / before.mean()), resampling.interval(1 - resampled[:, 1] / resampled[:, 0])
