"""How alike two models' answers are: WhoWhatBench's metrics, and the same without its traps.

Both modes give every question a similarity (the cosine of the two answers' sentence embeddings), FDT (how many tokens
are the same before the first divergent one), SDT (how many tokens diverge) and their norms.

"wwb"
    WhoWhatBench's own, to the last digit, so that figures can stand beside anybody's: tokens of the texts, encoded
    anew; difflib's matching blocks with its defaults; FDT over the mean length of all references. An answer whose only
    token has the id 0 counts as empty, as it does there.
"strict"
    The generated tokens themselves; FDT is the true common prefix, its norm the share of the reference that it is (1
    where both are empty); SDT is the edit distance, the tokens to exchange, add or leave out, its norm the share of
    the longer answer that they are. Nothing is ever NaN.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import takewhile
from typing import Literal

import numpy as np

from ovexport.bootstrap import too_few
from ovexport.evaluate.divergence import interval
from ovexport.reports import Similarity, WorstAnswer

Mode = Literal["wwb", "strict"]
Encoder = Callable[[Sequence[str], Sequence[str]], list[float]]
"""Cosines of the sentence embeddings of texts, pair by pair."""

_WORST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a model said.

    Attributes:
        texts: one for each prompt.
        generated: the tokens that the model generated.
        encoded: the tokens of the texts, as the model's own tokenizer encodes them, special tokens included.
    """

    texts: tuple[str, ...]
    generated: tuple[tuple[int, ...], ...]
    encoded: tuple[tuple[int, ...], ...]

    def tokens(self, mode: Mode) -> tuple[tuple[int, ...], ...]:
        """Those that a mode compares.

        Source: WhoWhatBench turns a text of one token into a plain number and asks whether that is true: 0 is not.
        """
        if mode == "strict":
            return self.generated
        return tuple(() if one == (0,) else one for one in self.encoded)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionMetrics:
    """The figures of one question; `reference_tokens` is the length of its reference."""

    similarity: float
    fdt: int
    sdt: int
    fdt_norm: float
    sdt_norm: float
    reference_tokens: int


def compare_answers(reference: Answers, candidate: Answers, encode: Encoder, mode: Mode) -> list[QuestionMetrics]:
    """The metrics, question by question."""
    cosines = encode(reference.texts, candidate.texts)
    pairs = list(zip(reference.tokens(mode), candidate.tokens(mode), strict=True))
    diverge = divergent_tokens if mode == "wwb" else differing_tokens
    divergences = [diverge(expected, actual) for expected, actual in pairs]
    mean_length = float(np.mean([len(expected) for expected, _ in pairs]))
    rows = []
    for cosine, (fdt, sdt, sdt_norm), (expected, actual) in zip(cosines, divergences, pairs, strict=True):
        norm = _over(fdt, mean_length) if mode == "wwb" else _share(fdt, expected, actual)
        rows.append(
            QuestionMetrics(
                similarity=cosine,
                fdt=fdt,
                sdt=sdt,
                fdt_norm=norm,
                sdt_norm=sdt_norm,
                reference_tokens=len(expected),
            )
        )
    return rows


def divergent_tokens(reference: Sequence[int], candidate: Sequence[int]) -> tuple[int, int, float]:
    """FDT, SDT and SDT norm of the mode "wwb".

    Source: WhoWhatBench's divergency metric: matching blocks of difflib.SequenceMatcher with its defaults.
    """
    if not reference and not candidate:
        return 0, 0, 0.0
    if not candidate:
        return 0, len(reference), 1.0
    if not reference:
        return 0, len(candidate), 1.0
    blocks = SequenceMatcher(None, reference, candidate).get_matching_blocks()
    first = blocks[0]
    fdt = first.size if (first.a, first.b) == (0, 0) else 0
    sdt = len(candidate) - sum(block.size for block in blocks)
    return fdt, sdt, sdt / len(candidate)


def differing_tokens(reference: Sequence[int], candidate: Sequence[int]) -> tuple[int, int, float]:
    """FDT, SDT and SDT norm of the mode "strict"."""
    distance = edit_distance(reference, candidate)
    return _common(reference, candidate), distance, distance / max(len(reference), len(candidate), 1)


def edit_distance(first: Sequence[int], second: Sequence[int]) -> int:
    """The least number of tokens to exchange, add or leave out to get from one sequence to the other.

    Source: Wagner and Fischer, The String-to-String Correction Problem, 1974, a row of the table at a time.
    """
    columns, tokens = np.arange(len(second) + 1), np.asarray(second)
    row = columns.copy()
    for index, token in enumerate(first, 1):
        reached = np.concatenate([[index], np.minimum(row[1:] + 1, row[:-1] + (tokens != token))])
        row = np.minimum.accumulate(reached - columns) + columns
    return int(row[-1])


def aggregate(rows: Sequence[QuestionMetrics], mode: Mode, seed: int = 0, resamples: int = 2000) -> Similarity:
    """Means over the questions, with the 95 % interval of the similarity's by bootstrap over them; None where they are
    too few for one.

    In the mode "wwb" the mean similarity is taken in float32, as its cosines are; FDT norm is the mean FDT over the
    mean length of the references, and None where WhoWhatBench has NaN, as all references are empty.
    """
    similarities = np.array([row.similarity for row in rows], np.float32 if mode == "wwb" else np.float64)
    fdt = float(np.mean([row.fdt for row in rows]))
    of_all = _over(fdt, float(np.mean([row.reference_tokens for row in rows])))
    fdt_norm = of_all if mode == "wwb" else float(np.mean([row.fdt_norm for row in rows]))
    chosen = np.random.default_rng(seed).integers(0, len(rows), (resamples, len(rows)))
    return Similarity(
        similarity=float(similarities.mean()),
        similarity_ci95=None if too_few(len(rows), "prompts") else interval(similarities[chosen].mean(axis=1)),
        fdt=fdt,
        fdt_norm=None if np.isnan(fdt_norm) else fdt_norm,
        sdt=float(np.mean([row.sdt for row in rows])),
        sdt_norm=float(np.mean([row.sdt_norm for row in rows])),
    )


def worst(
    prompts: Sequence[str], reference: Answers, candidate: Answers, rows: Sequence[QuestionMetrics]
) -> tuple[WorstAnswer, ...]:
    """The questions whose answers are least alike, those that are the same left out."""
    differing = [index for index in range(len(rows)) if reference.texts[index] != candidate.texts[index]]
    return tuple(
        WorstAnswer(
            prompt=prompts[index],
            reference=reference.texts[index],
            candidate=candidate.texts[index],
            similarity=rows[index].similarity,
            first_difference=_common(reference.texts[index], candidate.texts[index]),
        )
        for index in sorted(differing, key=lambda index: rows[index].similarity)[:_WORST]
    )


def _common(first: Sequence[object], second: Sequence[object]) -> int:
    """How many entries two sequences begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _over(fdt: float, mean_length: float) -> float:
    return fdt / mean_length if mean_length else float("nan")


def _share(common: int, reference: Sequence[int], candidate: Sequence[int]) -> float:
    return common / len(reference) if reference else float(not candidate)
