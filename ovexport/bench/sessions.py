"""Sessions of rounds: each loads the models again and runs them in turn, until enough is known or the time is up.

Where a model's weights come to lie in memory shifts all its rounds together by several percent, until it is loaded
again: another session is worth more than more rounds of the same one, and sessions are what the bootstrap draws.
"""

import gc
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import openvino_genai

from ovexport.artifacts import IR
from ovexport.bench.loading import RuntimeAdapter, generate, load_pipeline
from ovexport.bench.rounds import Round, orders, prompts, ratio, run_round
from ovexport.bootstrap import FEWEST_VALUES
from ovexport.progress import Listener, Progress
from ovexport.recipe import Backend, BenchSpec, GridPoint
from ovexport.reports import LatencyRatios, Ratio

EndedBy = Literal["precision", "time_limit_s", "pairs"]
"""The setting that ended a measurement."""

FEWEST_BEFORE_STOPPING = 8
_RESAMPLES_WHILE_MEASURING = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model and what is loaded with it."""

    ir: IR
    adapter: RuntimeAdapter | None

    @property
    def weight_bytes(self) -> int:
        """Size of the weights on disk, the adapter's included."""
        return self.ir.weight_bytes + (self.adapter.path.stat().st_size if self.adapter else 0)


@dataclass(slots=True)
class Latencies:
    """A model's figures: load times in milliseconds per session, and per session one entry for each round.

    Attributes:
        warmup: the first session's first round, which is in no statistic.
    """

    load: list[float] = field(default_factory=list)
    rounds: list[list[Round]] = field(default_factory=list)
    warmup: Round | None = None

    def of(self, figure: str) -> list[list[float]]:
        """A figure by session and round."""
        return [[getattr(one, figure) for one in session] for session in self.rounds]


Timed = Mapping[GridPoint, Mapping[str, Latencies]]
"""By point of the grid and model."""


def ratios(timed: Mapping[str, Latencies], seed: int, resamples: int = 5000) -> dict[str, LatencyRatios]:
    """The ratios of every two models, the later one over the earlier."""

    def over(later: str, earlier: str, figure: str) -> Ratio:
        return ratio(timed[later].of(figure), timed[earlier].of(figure), seed, resamples)

    return {
        f"{later}/{earlier}": LatencyRatios(
            time_to_first_token=over(later, earlier, "first_token_ms"),
            time_per_output_token=over(later, earlier, "output_token_ms"),
        )
        for earlier, later in itertools.combinations(timed, 2)
    }


def measure(
    candidates: Mapping[str, Candidate],
    spec: BenchSpec,
    backend: Backend,
    prompt: Sequence[int],
    seconds: float,
    listener: Listener,
) -> tuple[Timed, EndedBy]:
    """Measure a backend's points session after session until every ratio is known as precisely as asked, the time is
    up, or all rounds are done.

    The intervals' width alone is looked at, never where they lie, so that stopping early favours no model (Chow and
    Robbins, On the asymptotic theory of fixed-width sequential confidence intervals, 1965). Time that is up ends
    nothing before there are FEWEST_VALUES sessions, so that there is an interval; the first session sets how many
    rounds each has, so that as many of them fit into the time.

    Args:
        seconds: that it should take.

    Returns:
        What was measured, and the setting that ended it.
    """
    begun = time.monotonic()
    course = _Course(candidates, spec, backend, prompt)
    ended_by: EndedBy | None = None
    while ended_by is None:
        session_begun = time.monotonic()
        course.run_session(session_begun + seconds / FEWEST_VALUES if course.done == 0 else math.inf)
        now = time.monotonic()
        ended_by = course.ended_by(out_of_time=now + (now - session_begun) > begun + seconds)
        done = course.sessions if ended_by else course.done
        listener(Progress(task=f"bench {backend}", done=done, total=course.sessions))
    return course.timed, ended_by


class _Course:
    """The sessions of a backend, one at a time; `done` of at most `sessions`."""

    def __init__(
        self, candidates: Mapping[str, Candidate], spec: BenchSpec, backend: Backend, prompt: Sequence[int]
    ) -> None:
        self.done = 0
        self.sessions = min(spec.sessions, spec.pairs)
        points = [point for point in spec.points if point.attention_backend == backend]
        self.timed = {point: {name: Latencies() for name in candidates} for point in points}
        self._rounds = dict.fromkeys(points, math.ceil(spec.pairs / self.sessions))
        self._load_orders, self._run_orders = orders(candidates, spec.seed), orders(candidates, spec.seed)
        self._candidates, self._spec, self._backend, self._prompt = candidates, spec, backend, prompt

    def ended_by(self, *, out_of_time: bool) -> EndedBy | None:
        """The setting that ends it here; None where another session follows."""
        if self.done == self.sessions:
            return "pairs"
        if self.done >= FEWEST_BEFORE_STOPPING and _widest(self.timed, self._spec.seed) <= self._spec.precision:
            return "precision"
        return "time_limit_s" if self.done >= FEWEST_VALUES and out_of_time else None

    def run_session(self, until: float) -> None:
        """One session: load the models, then warm up and run the rounds of every point.

        Args:
            until: the moment that it should end; its points have fewer rounds for it, one at least, here and in every
                later session.
        """
        loads: dict[str, float] = {}
        pipelines = load_models(self._candidates, next(self._load_orders), self._spec, self._backend, loads)
        begun = time.monotonic()
        for number, (point, timed) in enumerate(self.timed.items(), 1):
            share = begun + (until - begun) * number / len(self.timed)
            self._rounds[point] = self._run_point(pipelines, point, share)
            for name, latencies in timed.items():
                latencies.load.append(loads[name])
        del pipelines
        gc.collect()
        self.done += 1

    def _run_point(self, pipelines: Mapping[str, openvino_genai.LLMPipeline], point: GridPoint, until: float) -> int:
        """Warm up and run a point's rounds, one at least and no other that would end after a moment; how many."""
        tokens, timed = prompts(self._prompt, point), self.timed[point]
        for latencies in timed.values():
            latencies.rounds.append([])
        for _ in range(self._spec.warmup):
            for name, measured in run_round(pipelines, tuple(timed), tokens, point).items():
                timed[name].warmup = timed[name].warmup or measured
        for done in range(1, self._rounds[point] + 1):
            begun = time.monotonic()
            for name, measured in run_round(pipelines, next(self._run_orders), tokens, point).items():
                timed[name].rounds[-1].append(measured)
            now = time.monotonic()
            if now + (now - begun) > until:
                return done
        return self._rounds[point]


def _widest(timed: Timed, seed: int) -> float:
    """Half the width of the widest interval, as a share of its median; infinite where there is none."""
    both = [
        figure
        for at in timed.values()
        for one in ratios(at, seed, _RESAMPLES_WHILE_MEASURING).values()
        for figure in (one.time_to_first_token, one.time_per_output_token)
    ]
    widths = [(one.ci95[1] - one.ci95[0]) / 2 / one.median if one.ci95 else math.inf for one in both]
    return max(widths, default=math.inf)


def load_models(
    candidates: Mapping[str, Candidate],
    order: Sequence[str],
    spec: BenchSpec,
    backend: Backend,
    loads: dict[str, float],
) -> dict[str, openvino_genai.LLMPipeline]:
    """The models' pipelines; `loads` takes their load times."""
    pipelines = {}
    for name in order:
        pipelines[name] = load_pipeline(candidates[name].ir, spec, backend, candidates[name].adapter)
        loaded = generate(pipelines[name], np.zeros((1, 1), np.int64), 2)
        loads[name] = float(loaded.perf_metrics.get_load_time())
    return pipelines
