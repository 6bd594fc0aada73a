"""Scores of configurations, each computed once and logged as soon as it is known.

What is tried next follows from the seed and the scores, so a search that was interrupted goes the same way again and
takes the scores that are in its log.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ovexport.progress import Listener, Progress
from ovexport.recipe import SearchSpec
from ovexport.reports import RankScore
from ovexport.storage.files import write_text
from ovexport.storage.records import read_json_lines
from ovexport.weights.ranks import Configuration


class Scores:
    """The configurations that were tried.

    Args:
        score: the figure of some validation examples with a configuration; less is better.
        total: validation examples in all.
        log: takes a JSON line per score.
        identity: digest of all that the scores depend on; lines of another search are left alone.

    Attributes:
        examples: indices of the sample.
    """

    def __init__(
        self,
        score: Callable[[Configuration, Sequence[int]], float],
        total: int,
        spec: SearchSpec,
        log: Path,
        identity: str,
        listener: Listener,
    ) -> None:
        self.total = total
        self.examples: list[int] = sorted(np.random.default_rng(spec.seed).permutation(total)[: spec.sample].tolist())
        self._score_with = score
        self._spec = spec
        self._log = log
        self._identity = identity
        self._listener = listener
        self._rows: dict[Configuration, RankScore] = {}
        self._known = self._read()

    @property
    def rows(self) -> tuple[RankScore, ...]:
        """By score on the sample, best first."""
        return tuple(sorted(self._rows.values(), key=lambda row: row.sample_nll_nats))

    def has(self, configuration: Configuration) -> bool:
        """Whether it was scored."""
        return configuration in self._rows

    def sample(self, configuration: Configuration, source: str) -> None:
        """Score a configuration on the sample; `source` says where it comes from."""
        if self.has(configuration):
            return
        nats, seconds = self._score(configuration, "sample", self.examples)
        self._rows[configuration] = RankScore(ranks=configuration, source=source, sample_nll_nats=nats, seconds=seconds)
        most = max(len(self._rows), self._spec.evaluations if self._spec.method == "evolution" else 0)
        self._listener(Progress(task="search", done=len(self._rows), total=most))

    def validate(self, configuration: Configuration) -> float:
        """Score a configuration on the whole validation split."""
        nats, seconds = self._score(configuration, "validation", range(self.total))
        row = self._rows[configuration]
        self._rows[configuration] = row.with_values(validation_nll_nats=nats, seconds=row.seconds + seconds)
        return nats

    def _score(self, configuration: Configuration, on: str, examples: Sequence[int]) -> tuple[float, float]:
        """The figure, infinite if it is not finite, and the seconds that it took."""
        key = (on, configuration)
        if key not in self._known:
            started = time.monotonic()
            nats = self._score_with(configuration, examples)
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
        ours = [entry for entry in entries if entry.get("identity") == self._identity]
        return {(entry["on"], tuple(entry["ranks"])): (entry["nll_nats"], entry["seconds"]) for entry in ours}
