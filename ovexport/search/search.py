"""The search of ranks: which configuration of the tuned, elastic adapters becomes the product.

A configuration's score is the mean -log p(token) of the right answers on a fixed sample of the task's validation split:
the same examples for every configuration. First the heuristics of the NLS example are scored, with the largest and the
smallest ranks; then evolution goes on from the best ones, with mutations of a few units and crossings of two parents.
The best few are scored on the whole validation split, and the best of these is chosen. The test split is not looked at.

Every score is logged as it is found. What is tried next follows from the seed and the scores, so a search that was
interrupted goes the same way again and takes the scores that it finds in the log.
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ovexport.progress import Listener, Progress
from ovexport.recipe import SearchSpec
from ovexport.reports import RankScore, SearchReport
from ovexport.storage.digests import bytes_digest, json_digest
from ovexport.storage.files import write_text
from ovexport.storage.records import read_json_lines
from ovexport.tune.tuner import Tuner
from ovexport.versions import stack_versions
from ovexport.weights.ranks import Configuration, RankSpace

logger = logging.getLogger(__name__)

_LEAST_LOSSES = 5
_PARENTS = 8
_CROSSED_SHARE = 0.5
_MUTATED_UNITS = 2.0
_MOST_DRAWS = 1000


@dataclass(frozen=True, slots=True)
class Found:
    """The ranks that were chosen, by layer, and how; no report where there was nothing to choose."""

    ranks: dict[str, int]
    report: SearchReport | None


def search(
    tuner: Tuner,
    values: dict[str, NDArray[np.float32]],
    spec: SearchSpec,
    losses: Sequence[tuple[int, float]],
    log: Path,
    identity: str,
    listener: Listener,
) -> Found:
    """Choose the ranks of tuned parameters.

    Args:
        values: the parameters that tuning kept.
        losses: steps of the tuning, from 0, each with its loss; its configuration follows from the step.
        log: takes a JSON line per score, and gives those that an interrupted search of the same values, spec and
            identity left.

    Raises:
        RecipeError: `spec.ranks` does not suit the adapters.
    """
    space = tuner.space
    if spec.ranks is not None:
        chosen = space.chosen(spec.ranks, "search.ranks")
        return Found(space.by_layer(chosen), None)
    if not space.is_choice or not tuner.steps:
        return Found(space.by_layer(space.median), None)
    digests = {name: bytes_digest(np.ascontiguousarray(value)) for name, value in sorted(values.items())}
    scores = _Scores(tuner, values, spec, log, json_digest([identity, spec.model_dump(), digests]), listener)
    for source, configuration in _heuristics(tuner, losses):
        scores.sample(configuration, source)
    if spec.method == "evolution":
        for configuration in _children(space, scores, spec):
            scores.sample(configuration, "evolution")
    finalists = [row.ranks for row in scores.rows[: spec.finalists]]
    if space.median not in finalists:
        finalists.append(space.median)
    best = min(finalists, key=scores.whole)
    logger.info("  ranks chosen of %d configurations: %s", len(scores.rows), " ".join(map(str, best)))
    report = SearchReport(
        units=space.units,
        rank_space=space.ranks,
        chosen=best,
        scores=scores.rows,
        sample_examples=len(scores.examples),
        validation_examples=scores.total,
        versions=stack_versions(),
    )
    return Found(space.by_layer(best), report)


def _heuristics(tuner: Tuner, losses: Sequence[tuple[int, float]]) -> Iterator[tuple[str, Configuration]]:
    space = tuner.space
    yield "median", space.median
    drawn = [tuner.configuration(step) for step, _ in losses]
    if drawn:
        yield "most frequent", space.most_frequent(drawn)
    for index in np.argsort([loss for _, loss in losses], kind="stable")[:_LEAST_LOSSES]:
        yield "least loss", drawn[index]
    for name, rank in (("largest", max(space.ranks)), ("smallest", min(space.ranks))):
        yield name, (rank,) * len(space.units)


def _children(space: RankSpace, scores: "_Scores", spec: SearchSpec) -> Iterator[Configuration]:
    """New configurations from the best so far, until as many are scored as were asked for or none is left."""
    generator = np.random.default_rng(spec.seed)
    possible = len(space.ranks) ** len(space.units)
    while len(scores.rows) < min(spec.evaluations, possible):
        for _ in range(_MOST_DRAWS):
            child = _child(space, [row.ranks for row in scores.rows[:_PARENTS]], generator)
            if not scores.has(child):
                break
        else:
            return
        yield child


def _child(space: RankSpace, parents: Sequence[Configuration], generator: np.random.Generator) -> Configuration:
    first, second = (np.array(parents[index]) for index in generator.integers(0, len(parents), 2))
    crossed = generator.random() < _CROSSED_SHARE
    mixed = np.where(generator.random(len(first)) < 0.5, first, second) if crossed else first
    mutated = generator.random(len(mixed)) < min(1.0, _MUTATED_UNITS / len(mixed))
    drawn = generator.choice(space.ranks, len(mixed))
    return tuple(int(rank) for rank in np.where(mutated, drawn, mixed))


class _Scores:
    """Scores of configurations, each computed once.

    Attributes:
        examples: indices of the sample.
        total: validation examples in all.
    """

    def __init__(
        self,
        tuner: Tuner,
        values: dict[str, NDArray[np.float32]],
        spec: SearchSpec,
        log: Path,
        identity: str,
        listener: Listener,
    ) -> None:
        self._tuner = tuner
        self._values = values
        self._spec = spec
        self._log = log
        self._identity = identity
        self._listener = listener
        self.total = tuner.validation_examples
        drawn = np.random.default_rng(spec.seed).permutation(self.total)[: spec.sample]
        self.examples: list[int] = sorted(drawn.tolist())
        self._rows: dict[Configuration, RankScore] = {}
        self._known = self._read()
        self._loaded = False

    @property
    def rows(self) -> tuple[RankScore, ...]:
        """By score on the sample, best first."""
        return tuple(sorted(self._rows.values(), key=lambda row: row.sample_nll_nats))

    def has(self, configuration: Configuration) -> bool:
        """Whether it was scored."""
        return configuration in self._rows

    def sample(self, configuration: Configuration, source: str) -> None:
        """Score a configuration on the sample; `source` says how it was come by."""
        if self.has(configuration):
            return
        nats, seconds = self._score(configuration, "sample", self.examples)
        self._rows[configuration] = RankScore(ranks=configuration, source=source, sample_nll_nats=nats, seconds=seconds)
        most = max(len(self._rows), self._spec.evaluations if self._spec.method == "evolution" else 0)
        self._listener(Progress(task="search", done=len(self._rows), total=most))

    def whole(self, configuration: Configuration) -> float:
        """Score a configuration on the whole validation split."""
        nats, seconds = self._score(configuration, "validation", range(self.total))
        row = self._rows[configuration]
        self._rows[configuration] = row.model_copy(
            update={"validation_nll_nats": nats, "seconds": row.seconds + seconds}
        )
        return nats

    def _score(self, configuration: Configuration, on: str, examples: Sequence[int]) -> tuple[float, float]:
        key = (on, configuration)
        if key not in self._known:
            if not self._loaded:
                self._tuner.take_up(self._values, {})
                self._loaded = True
            started = time.monotonic()
            self._tuner.use_ranks(self._tuner.space.by_layer(configuration))
            nats = self._tuner.score(examples)
            self._known[key] = (nats if math.isfinite(nats) else math.inf, time.monotonic() - started)
            self._write(on, configuration, *self._known[key])
        return self._known[key]

    def _write(self, on: str, configuration: Configuration, nats: float, seconds: float) -> None:
        line = {"identity": self._identity, "on": on, "ranks": configuration, "nll_nats": nats, "seconds": seconds}
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self) -> dict[tuple[str, Configuration], tuple[float, float]]:
        """The scores in the log, which loses a line that a kill cut short."""
        entries = read_json_lines(self._log)
        write_text("".join(json.dumps(entry) + "\n" for entry in entries), self._log)
        entries = [entry for entry in entries if entry.get("identity") == self._identity]
        return {(entry["on"], tuple(entry["ranks"])): (entry["nll_nats"], entry["seconds"]) for entry in entries}
