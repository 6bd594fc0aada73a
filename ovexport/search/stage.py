"""The stage: which configuration of the tuned, elastic adapters becomes the product.

A configuration's score is the objective's figure, such as the mean -log p(token) of the right answers, on a fixed
sample of the validation split: the same examples for every configuration. First the heuristics of the NLS example are
scored, with the largest and the smallest ranks; then evolution goes on from the best ones. The best few are scored on
the whole validation split, and the best of these is chosen. The test split is not looked at.

Adapters without a choice of ranks keep those that tuning left: the checkpoint's files are links to it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ovexport.artifacts import DRAWN_RANKS, Checkpoint, DrawnRanks, PreparedData
from ovexport.models.checkpoint import write_outcome
from ovexport.models.device import Compute
from ovexport.models.head import Head
from ovexport.models.student import Student
from ovexport.models.uncompressed import load_uncompressed
from ovexport.objectives import Material, Objective, build_objective
from ovexport.progress import Listener, silent
from ovexport.recipe import ModelSpec, SearchSpec, TuneSpec
from ovexport.reports import SearchReport
from ovexport.search.candidates import children, heuristics
from ovexport.search.scores import Scores
from ovexport.storage.files import atomic_folder, files_in, link_file
from ovexport.versions import stack_versions
from ovexport.weights.ranks import Configuration, RankSpace

logger = logging.getLogger(__name__)


def search(
    tuned: Checkpoint,
    model: ModelSpec,
    spec: SearchSpec,
    tuning: TuneSpec,
    data: PreparedData,
    out: Path,
    *,
    log: Path,
    identity: str,
    listener: Listener = silent,
) -> SearchReport | None:
    """Choose the ranks of a tuned checkpoint, and write it with them.

    Args:
        tuning: whose objective, batch size, device and precision the scores are computed with.
        log: takes a JSON line per score, and gives those that an interrupted search of the same identity left.
        identity: digest of all that this search depends on.

    Returns:
        How they were chosen; None if there was nothing to choose.

    Raises:
        RecipeError: `spec.ranks` does not suit the adapters.
    """
    space, drawn = tuned.manifest.elastic_ranks, tuned.drawn_ranks
    if spec.ranks is None and drawn is None:
        _write_linked(tuned, out)
        return None
    given = None if spec.ranks is None else space.chosen(spec.ranks, "search.ranks")
    subject = _load_subject(tuned, model, tuning, data, listener)
    if given is not None or drawn is None:
        chosen, report = given or space.median, None
    else:
        examples = subject.objective.validation_examples
        scores = Scores(subject.score, examples, spec, log, identity, listener)
        report = _choose(space, drawn, spec, scores)
        chosen = report.chosen
    _write_chosen(tuned, subject, chosen, data, out)
    return report


def _choose(space: RankSpace, drawn: DrawnRanks, spec: SearchSpec, scores: Scores) -> SearchReport:
    """Score the heuristics, let evolution go on from them, and take the best of the finalists."""
    for source, configuration in heuristics(space, drawn.steps):
        scores.sample(configuration, source)
    if spec.method == "evolution":
        for configuration in children(space, scores, spec):
            scores.sample(configuration, "evolution")
    finalists = [row.ranks for row in scores.rows[: spec.finalists]]
    if space.median not in finalists:
        finalists.append(space.median)
    best = min(finalists, key=scores.validate)
    logger.info("  ranks chosen of %d configurations: %s", len(scores.rows), " ".join(map(str, best)))
    return SearchReport(
        units=space.units,
        rank_space=space.ranks,
        chosen=best,
        scores=scores.rows,
        sample_examples=len(scores.examples),
        validation_examples=scores.total,
        versions=stack_versions(),
    )


@dataclass(frozen=True, slots=True)
class _Subject:
    """The tuned model, whose ranks can be set, and the objective that scores it."""

    student: Student
    head: Head
    objective: Objective
    space: RankSpace

    def score(self, configuration: Configuration, examples: Sequence[int]) -> float:
        """The objective's figure of some validation examples with these ranks."""
        self.student.use_ranks(self.space.by_layer(configuration))
        return self.objective.score(self.student.network, self.head, examples)


def _load_subject(
    tuned: Checkpoint, model: ModelSpec, tuning: TuneSpec, data: PreparedData, listener: Listener
) -> _Subject:
    compute, manifest = Compute.of(tuning.device, tuning.precision), tuned.manifest
    base = load_uncompressed(model, manifest.layers, compute)
    nothing_to_learn = np.zeros(0, dtype=np.int64)
    objective = build_objective(
        Material(
            base=base,
            compute=compute,
            spec=tuning,
            model=model,
            data=data,
            train=nothing_to_learn,
            listener=listener,
        )
    )
    student = Student(base.network, tuned, base.own_weights, compute.dtype)
    return _Subject(student, student.head, objective, manifest.elastic_ranks)


def _write_linked(tuned: Checkpoint, out: Path) -> None:
    """The tuned checkpoint as it is, at no cost."""
    with atomic_folder(out) as folder:
        for file in files_in(tuned.path):
            link_file(file, folder / file.name)


def _write_chosen(tuned: Checkpoint, subject: _Subject, chosen: Configuration, data: PreparedData, out: Path) -> None:
    """The tuned adapters with the ranks that were chosen."""
    ranks = subject.space.by_layer(chosen)
    subject.student.use_ranks(ranks)
    outcome = {"checkpoint.json", "reference.safetensors", DRAWN_RANKS}
    with atomic_folder(out) as folder:
        for file in files_in(tuned.path):
            if file.name not in outcome:
                link_file(file, folder / file.name)
        write_outcome(folder, tuned.manifest, subject.student, ranks, data.tokens("test"))
