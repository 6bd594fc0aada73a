"""The plots of the page, as SVG text."""

import io
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.figure import Figure

from ovexport.artifacts import read_json_lines
from ovexport.report.table import TITLES
from ovexport.reports import BenchmarkReport, EvaluationReport, SearchReport

COLOURS = {"bf16": "#5b6770", "plain": "#d08c2e", "int4": "#0068b5"}
_SIZE_INCHES = (5.2, 3.0)
_VALIDATED = {
    "validation_kl_nats": "KL from BF16, nats",
    "validation_nll_nats": "-log p of a token, nats",
}
_BARS = (
    ("time_to_first_token_ms", "time to first token, ms"),
    ("time_per_output_token_ms", "time per output token, ms"),
)


def tuning_curve(log: Path) -> str | None:
    """Training loss and validation figure over the steps; None when there was no tuning."""
    lines = read_json_lines(log)
    steps = [(line["step"], line["loss_nats"]) for line in lines if "loss_nats" in line]
    figure_name, label = next(
        ((name, label) for name, label in _VALIDATED.items() if any(name in line for line in lines)), (None, "")
    )
    checks = [(line["step"], line[figure_name]) for line in lines if figure_name in line]
    if not steps:
        return None
    figure, axes = pyplot.subplots(figsize=_SIZE_INCHES)
    axes.plot(*zip(*steps, strict=True), color="#9cc4e4", linewidth=1, label="training")
    if checks:
        axes.plot(*zip(*checks, strict=True), color=COLOURS["int4"], marker="o", markersize=4, label="validation")
    axes.set(xlabel="optimizer step", ylabel=label, yscale="log")
    axes.legend(frameon=False)
    return _svg(figure)


def search_scatter(search: SearchReport) -> str:
    """Each configuration's mean rank and score on the sample; the chosen one is marked."""
    figure, axes = pyplot.subplots(figsize=_SIZE_INCHES)
    for label, colour, wanted in (("heuristics", COLOURS["plain"], False), ("evolution", "#9cc4e4", True)):
        rows = [row for row in search.scores if (row.source == "evolution") == wanted]
        axes.scatter(
            [fmean(row.ranks) for row in rows], [row.sample_nll_nats for row in rows], s=16, color=colour, label=label
        )
    chosen = next(row for row in search.scores if row.ranks == search.chosen)
    axes.scatter(
        [fmean(chosen.ranks)],
        [chosen.sample_nll_nats],
        s=70,
        facecolors="none",
        edgecolors=COLOURS["int4"],
        linewidths=1.8,
        label="chosen",
    )
    axes.set(xlabel="mean rank", ylabel="-log p of a token of the answers, nats")
    axes.legend(frameon=False)
    return _svg(figure)


def divergence_distribution(evaluation: EvaluationReport) -> str:
    """Histogram of the per-token divergence, both axes' densities over the logarithm of nats."""
    figure, axes = pyplot.subplots(figsize=_SIZE_INCHES)
    for name, model in evaluation.models.items():
        if model.kl_histogram is None:
            continue
        total = sum(model.kl_histogram)
        shares = [count / total for count in model.kl_histogram]
        axes.stairs(shares, evaluation.histogram_edges_nats, color=COLOURS.get(name), label=TITLES.get(name, name))
    axes.set(xscale="log", xlabel="KL from BF16 of a token, nats", ylabel="share of tokens")
    axes.legend(frameon=False)
    return _svg(figure)


def latency_bars(benchmark: BenchmarkReport) -> str:
    """Median latencies with the 90th percentile as whisker."""
    figure, panels = pyplot.subplots(1, 2, figsize=(_SIZE_INCHES[0] * 1.3, _SIZE_INCHES[1]))
    names = list(benchmark.models)
    for axes, (field, title) in zip(panels, _BARS, strict=True):
        samples = [getattr(benchmark.models[name], field) for name in names]
        medians = [one.median for one in samples]
        whiskers = [[0.0] * len(names), [one.p90 - one.median for one in samples]]
        colours = [COLOURS.get(name, "#888888") for name in names]
        axes.bar([TITLES.get(name, name) for name in names], medians, yerr=whiskers, capsize=3, color=colours)
        axes.set_title(title, fontsize=9)
        axes.tick_params(axis="x", labelsize=7)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
