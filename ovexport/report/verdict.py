"""The answer first: whether the product may ship, and its size, quality and speed in a line each."""

from dataclasses import dataclass
from typing import Literal

from ovexport.report.table import PRODUCT, TITLES, Findings, holds_one
from ovexport.reports import BenchmarkReport, EvaluationReport

Standing = Literal["good", "bad", "open"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the product may ship.

    Attributes:
        standing: "open" where the proof or the gates are not there to say, or the proof is partial.
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
    proof, gates = findings.verification, findings.gates
    reasons = [_proof_reason(findings), _gates_reason(findings)]
    if proof and not proof.passed:
        return Verdict("bad", "Not fit to ship: the proof failed", tuple(reasons))
    if gates and not gates.passed:
        return Verdict("bad", "Not fit to ship: a gate failed", tuple(reasons))
    if proof and proof.verdict != "proven":
        return Verdict("open", "Partly proven", tuple(reasons))
    if proof and gates:
        return Verdict("good", "Fit to ship: proven, and every gate passed", tuple(reasons))
    if proof:
        return Verdict("good", "Verified: it is the model that was tuned", tuple(reasons))
    return Verdict("open", "Not proven yet", tuple(reasons))


def _proof_reason(findings: Findings) -> str:
    proof = findings.verification
    if proof is None:
        return "Proof: none in this run; ovexport verify makes one."
    return f"Proof: {proof.told}."


def _gates_reason(findings: Findings) -> str:
    if findings.gates is None:
        return "Gates: none were set."
    gates = findings.gates.gates
    return f"Gates: {sum(gate.passed for gate in gates)} of {len(gates)} passed."


def headlines(findings: Findings) -> tuple[Headline, ...]:
    """Size, quality and speed of the product against the uncompressed model, those that were measured."""
    evaluation, benchmark = findings.evaluation, findings.benchmark
    return (
        *(_of_benchmark(benchmark) if benchmark else ()),
        *(_of_evaluation(evaluation) if evaluation else ()),
    )


def _of_benchmark(benchmark: BenchmarkReport) -> tuple[Headline, ...]:
    reference = next(iter(benchmark.models))
    ratios = benchmark.ratios.get(f"{PRODUCT}/{reference}")
    if ratios is None:
        return ()
    product, base = benchmark.models[PRODUCT].weight_bytes, benchmark.models[reference].weight_bytes
    title = TITLES.get(reference, reference)
    ratio = ratios.time_per_output_token
    between = f"95 % interval {1 / ratio.ci95[1]:.2f} to {1 / ratio.ci95[0]:.2f}" if ratio.ci95 else str(ratio.reason)
    speed = Headline(
        f"{1 / ratio.median:.2f}×",
        f"as fast as {title} per token" + (", a tie" if holds_one(ratio.ci95) else ""),
        f"{between}; first token {1 / ratios.time_to_first_token.median:.2f}×",
    )
    size = Headline(
        f"{base / product:.1f}×",
        "smaller on disk" if product < base else "the size on disk",
        f"{product / 1e6:.2f} MB of weights instead of {base / 1e6:.2f}",
    )
    return size, speed


def _of_evaluation(evaluation: EvaluationReport) -> tuple[Headline, ...]:
    model = evaluation.models.get(PRODUCT)
    if model is None or model.same_top1 is None:
        return ()
    title = TITLES.get(evaluation.reference, evaluation.reference)
    reference = evaluation.models[evaluation.reference].perplexity
    perplexities = (
        f"perplexity {model.perplexity:.2f} instead of {reference:.2f}"
        if model.perplexity is not None and reference is not None
        else ""
    )
    found = [Headline(f"{model.same_top1:.1%}", f"of tokens chosen as {title} does", perplexities)]
    if evaluation.recovered_gap is not None:
        interval = evaluation.recovered_gap_ci95
        found.append(
            Headline(
                f"{evaluation.recovered_gap:.0%}",
                "of the rounding's divergence tuned away",
                f"95 % interval {interval[0]:.0%} to {interval[1]:.0%}" if interval else "",
            )
        )
    return tuple(found)
