"""The answer first: whether the product may ship, and its size, quality and speed in a line each."""

from dataclasses import dataclass
from typing import Literal

from ovexport.numbers import between, written
from ovexport.report.names import NOT_TUNED, PRODUCT, Titles
from ovexport.report.table import Findings, holds_one
from ovexport.reports import BenchmarkReport, EvaluationReport

Standing = Literal["good", "bad", "open"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the product may ship.

    Attributes:
        standing: "open" where proof or gates are not there to say, the proof is partial, or a gate is undecided.
    """

    standing: Standing
    headline: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Headline:
    """A figure large enough for a slide.

    Attributes:
        figure: the number.
        meaning: what it says, read after the number.
        detail: what it was taken from, and its interval.
    """

    figure: str
    meaning: str
    detail: str


def verdict(findings: Findings) -> Verdict:
    """What the proof and the gates say together."""
    reasons = (_proof_reason(findings), *_tuning_reason(findings), _gates_reason(findings))
    return Verdict(*_standing(findings), reasons)


def _standing(findings: Findings) -> tuple[Standing, str]:
    """Whether the product may ship, and the headline: the first of these that is so."""
    proof, gates = findings.verification, findings.gates
    cases: tuple[tuple[object, Standing, str], ...] = (
        (proof and not proof.passed, "bad", "Not fit to ship: the proof failed"),
        (gates and any(gate.status == "failed" for gate in gates.gates), "bad", "Not fit to ship: a gate failed"),
        (not proof, "open", "Not proven yet"),
        (proof and proof.verdict != "proven", "open", "Partly proven"),
        (not gates, "open", "Conversion verified, quality not judged"),
        (gates and not gates.passed, "open", "Conversion verified, quality undecided"),
    )
    holding = ((standing, headline) for holds, standing, headline in cases if holds)
    return next(holding, ("good", "Fit to ship: proven, and every gate passed"))


def _proof_reason(findings: Findings) -> str:
    proof = findings.verification
    if proof is None:
        return "Proof: none in this run; ovexport verify makes one."
    return f"Proof: {proof.told}."


def _tuning_reason(findings: Findings) -> tuple[str, ...]:
    if findings.tuned is not False:
        return ()
    return (f"Tuning: none is in this model: {NOT_TUNED}.",)


def _gates_reason(findings: Findings) -> str:
    if findings.gates is None:
        return "Gates: none were set, so nothing judges the quality; set limits in [gates]."
    gates = findings.gates.gates
    undecided = sum(gate.undecided for gate in gates)
    passed = f"Gates: {sum(gate.passed for gate in gates)} of {len(gates)} passed"
    return f"{passed}, {undecided} undecided: too little was measured." if undecided else f"{passed}."


def headlines(findings: Findings) -> tuple[Headline, ...]:
    """Size, quality and speed of the product against the uncompressed model, those that were measured."""
    evaluation, benchmark, called = findings.evaluation, findings.benchmark, findings.titles
    return (
        *(_of_benchmark(benchmark, called) if benchmark else ()),
        *(_of_evaluation(evaluation, called) if evaluation else ()),
    )


def _of_benchmark(benchmark: BenchmarkReport, called: Titles) -> tuple[Headline, ...]:
    reference = next(iter(benchmark.models))
    ratios = benchmark.ratios.get(f"{PRODUCT}/{reference}")
    if ratios is None:
        return ()
    product, base = benchmark.models[PRODUCT].weight_bytes, benchmark.models[reference].weight_bytes
    title = called[reference]
    ratio = ratios.time_per_output_token
    between_ends = str(ratio.reason)
    if ratio.ci95 is not None:
        between_ends = "95 % interval " + between(*(written(1 / end, ".2f") for end in reversed(ratio.ci95)))
    speed = Headline(
        f"{written(1 / ratio.median, '.2f')}×",
        f"as fast as {title} per token" + (", a tie" if holds_one(ratio.ci95) else ""),
        f"{between_ends}; first token {written(1 / ratios.time_to_first_token.median, '.2f')}×",
    )
    size = Headline(
        f"{written(base / product, '.1f')}×",
        "smaller on disk" if product < base else "the size on disk",
        f"{written(product / 1e6, '.2f')} MB of weights instead of {written(base / 1e6, '.2f')}",
    )
    return size, speed


def _of_evaluation(evaluation: EvaluationReport, called: Titles) -> tuple[Headline, ...]:
    model = evaluation.models.get(PRODUCT)
    if model is None or model.same_top1 is None:
        return ()
    title = called[evaluation.reference]
    reference = evaluation.models[evaluation.reference].perplexity
    perplexities = (
        f"perplexity {written(model.perplexity, '.2f')} instead of {written(reference, '.2f')}"
        if model.perplexity is not None and reference is not None
        else ""
    )
    headlines = [Headline(written(model.same_top1, ".1%"), f"of tokens chosen as {title} does", perplexities)]
    if evaluation.recovered_gap is not None:
        interval = evaluation.recovered_gap_ci95
        headlines.append(
            Headline(
                written(evaluation.recovered_gap, ".0%"),
                "of what 4-bit rounding lost was recovered by tuning",
                f"95 % interval {between(*(written(end, '.0%') for end in interval))}" if interval else "",
            )
        )
    return tuple(headlines)
