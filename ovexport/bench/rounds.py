"""One generation and its times, several models in turn, and what is made of many: quantiles and ratios pair by pair."""

import hashlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import openvino_genai
from numpy.typing import NDArray

from ovexport.bench.loading import generate
from ovexport.bootstrap import too_few
from ovexport.errors import UnsupportedModelError
from ovexport.recipe import GridPoint
from ovexport.reports import Generation, Ratio, Samples

_MOST_PERMUTED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One generation: to the first token, between every two of the others, and all of it.

    Attributes:
        inferences_ms: of the model alone, one for each token.
        texts: what its prompts and answers are as text.
    """

    began: datetime
    ended: datetime
    first_token_ms: float
    intervals_ms: tuple[float, ...]
    whole_ms: float
    inferences_ms: tuple[float, ...]
    texts: "Texts"

    @property
    def output_token_ms(self) -> float:
        """The mean time between two tokens."""
        return sum(self.intervals_ms) / len(self.intervals_ms)

    def listed(self, *, warmup: bool = False) -> Generation:
        """As a report lists it."""
        first, *others = self.inferences_ms
        return Generation(
            warmup=warmup,
            began=self.began.isoformat(),
            ended=self.ended.isoformat(),
            first_token_ms=self.first_token_ms,
            output_token_ms=self.output_token_ms,
            whole_ms=self.whole_ms,
            first_inference_ms=first,
            other_inferences_ms=sum(others) / len(others),
            tokenization_ms=self.texts.encoding_ms,
            detokenization_ms=self.texts.decoding_ms,
            result_md5=self.texts.md5,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """How long encoding the prompts' text and decoding the answers took, beside the timed generation, and the MD5 of
    each answer's text; None and nothing, where the IR has no tokenizer for it."""

    encoding_ms: float | None
    decoding_ms: float | None
    md5: tuple[str, ...]


def prompts(prompt: Sequence[int], point: GridPoint) -> NDArray[np.int64]:
    """The prompts of a batch, (batch, length): the same tokens, begun at another place in each row."""
    tokens = np.asarray(prompt[: point.prompt_tokens], dtype=np.int64)
    return np.stack([np.roll(tokens, row) for row in range(point.batch_size)])


def orders(names: Mapping[str, Any], seed: int) -> Iterator[tuple[str, ...]]:
    """Orders without end: each as often as any other, or drawn at random where there are too many of them."""
    if len(names) <= _MOST_PERMUTED:
        yield from itertools.cycle(itertools.permutations(names))
    generator = np.random.default_rng(seed)
    while True:
        yield tuple(generator.permutation(list(names)).tolist())


def run_round(
    pipelines: Mapping[str, openvino_genai.LLMPipeline],
    order: Sequence[str],
    tokens: NDArray[np.int64],
    point: GridPoint,
) -> dict[str, Round]:
    """What each model took.

    Raises:
        UnsupportedModelError: one generated another number of tokens.
    """
    measured = {}
    for name in order:
        began, begun = datetime.now(), time.perf_counter()
        result = generate(pipelines[name], tokens, point.output_tokens)
        whole, ended = 1000 * (time.perf_counter() - begun), datetime.now()
        generated = {len(row) for row in result.tokens}
        if generated != {point.output_tokens}:
            raise UnsupportedModelError(
                f"{name}: generated {min(generated)} of {point.output_tokens} tokens; it can't be timed"
            )
        raw = result.perf_metrics.raw_metrics
        moments = [float(moment) for moment in raw.m_new_token_times]
        measured[name] = Round(
            began=began,
            ended=ended,
            first_token_ms=float(result.perf_metrics.get_ttft().mean),
            intervals_ms=tuple(float(value) for value in np.diff(moments)),
            whole_ms=whole,
            inferences_ms=tuple(float(microseconds) / 1000 for microseconds in raw.token_infer_durations),
            texts=_texts(pipelines[name], tokens, np.asarray(result.tokens, np.int64)),
        )
    return measured


def _texts(pipeline: openvino_genai.LLMPipeline, prompts: NDArray[np.int64], answers: NDArray[np.int64]) -> Texts:
    try:
        tokenizer = pipeline.get_tokenizer()
        questions = tokenizer.decode(prompts)
        begun = time.perf_counter()
        tokenizer.encode(questions)
        encoded = time.perf_counter()
        said = tokenizer.decode(answers)
        decoded = time.perf_counter()
    except RuntimeError:
        return Texts(encoding_ms=None, decoding_ms=None, md5=())
    md5 = tuple(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() for text in said)
    return Texts(encoding_ms=1000 * (encoded - begun), decoding_ms=1000 * (decoded - encoded), md5=md5)


def samples(sessions: Sequence[Sequence[float]]) -> Samples:
    """The quantiles over all sessions' values, and the values."""
    values = [value for session in sessions for value in session]
    median, p90, p99 = np.percentile(values, [50, 90, 99])
    return Samples(median=float(median), p90=float(p90), p99=float(p99), samples=tuple(values))


def ratio(
    candidate: Sequence[Sequence[float]], reference: Sequence[Sequence[float]], seed: int, resamples: int = 5000
) -> Ratio:
    """Median of the pairwise ratios and its 95 % interval, which fewer than FEWEST_VALUES sessions don't give.

    The bootstrap draws sessions first and then pairs within them: pairs alone would promise too much, as those of a
    session move together. Drawing at both levels is on the careful side (Davison and Hinkley, Bootstrap Methods and
    their Application, 3.8).

    Args:
        candidate, reference: samples by session, (sessions, rounds).

    Raises:
        ValueError: the numbers of sessions or of samples differ.
    """
    if {len(session) for session in (*candidate, *reference)} != {len(candidate[0])} or len(candidate) != len(
        reference
    ):
        raise ValueError("sessions of different lengths can't be paired")
    ratios = np.asarray(candidate) / np.asarray(reference)
    sessions, rounds = ratios.shape
    median, reason = float(np.median(ratios)), too_few(sessions, "sessions")
    if reason:
        return Ratio(median=median, ci95=None, reason=reason)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, sessions, (resamples, sessions, 1))
    pairs = generator.integers(0, rounds, (resamples, sessions, rounds))
    medians = np.median(ratios[drawn, pairs].reshape(resamples, -1), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Ratio(median=median, ci95=(float(low), float(high)))
