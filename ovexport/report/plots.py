"""The plots of the page. Each takes reports and returns a Plot, or None where there is nothing to draw."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ovexport.numbers import with_interval, written
from ovexport.report.drawing import FAINT, INK, SERIES, SOFT, Plot, colour_of, logarithmic, sheet, style, svg
from ovexport.report.names import PLAIN, PRODUCT, Titles, titles
from ovexport.report.table import Column
from ovexport.reports import (
    BenchmarkReport,
    ModelBenchmark,
    PeakMemory,
    PointBenchmark,
    Ratio,
    Samples,
    SearchReport,
    SensitivityReport,
    VerificationReport,
)
from ovexport.storage.records import read_json_lines

_VALIDATED = {
    "validation_kl_nats": "KL from the uncompressed model, nats",
    "validation_nll_nats": "-log p of a token, nats",
}
_LATENCIES = (
    ("time_to_first_token_ms", "time_to_first_token", "time to first token, ms"),
    ("time_per_output_token_ms", "time_per_output_token", "time per output token, ms"),
)
_BAR_INCHES = 0.42
_FRAME_INCHES = 0.75
STEPS = {
    "weights": "weights alone",
    "kv_cache": "with the KV cache",
    "dynamic_quantization": "with dynamic quantization",
    "activations": "with activations",
    "deployment": "as it ships",
}


def tuning_curve(log: Path) -> Plot | None:
    """Training loss and validation figure over the steps; None when there was no tuning."""
    lines = read_json_lines(log)
    steps = [(line["step"], line["loss_nats"]) for line in lines if "loss_nats" in line]
    figure_name = next((name for line in lines for name in line if name.startswith("validation_")), "")
    label = _VALIDATED.get(figure_name, figure_name.replace("_", " "))
    checks = [(line["step"], line[figure_name]) for line in lines if figure_name in line]
    values = [value for _, value in (*steps, *checks) if value > 0]
    if not steps or not values:
        return None
    title = "Tuning"
    with style():
        figure, (axes,) = sheet()
        axes.plot(*zip(*steps, strict=True), color=FAINT, linewidth=1, label="training")
        if checks:
            axes.plot(*zip(*checks, strict=True), color=SERIES[0], marker="o", markersize=4, label="validation")
        axes.set(xlabel="optimizer step", title=label, yscale="log")
        logarithmic(axes.yaxis, min(values), max(values))
        axes.legend()
        return Plot(title, "The loss of every step, and of validation text that is held out.", svg(figure, title))


def search_scatter(search: SearchReport) -> Plot:
    """Each configuration's mean rank and score on the sample; the chosen one is marked."""
    title = "Search of ranks"
    chosen = next(row for row in search.scores if row.ranks == search.chosen)
    with style():
        figure, (axes,) = sheet()
        for label, colour, wanted in (("heuristics", SERIES[1], False), ("evolution", FAINT, True)):
            rows = [row for row in search.scores if (row.source == "evolution") == wanted]
            means, scores = [fmean(row.ranks) for row in rows], [row.sample_nll_nats for row in rows]
            axes.scatter(means, scores, s=16, color=colour, label=label)
        axes.scatter(
            [fmean(chosen.ranks)],
            [chosen.sample_nll_nats],
            s=70,
            facecolors="none",
            edgecolors=SERIES[0],
            linewidths=1.8,
            label="chosen",
        )
        axes.set(xlabel="mean rank", title="-log p of a token of the answers, nats")
        axes.legend()
        return Plot(title, "Each configuration that was scored; lower is better.", svg(figure, title))


def frontier(sensitivities: SensitivityReport) -> Plot | None:
    """The least cost at each size, and the size that was allowed; none where nothing costs anything."""
    title = "Bits where they count"
    points = [point for point in sensitivities.frontier if point.cost_nats > 0]
    if not points:
        return None
    sizes = [(sensitivities.fixed_bytes + point.weight_bytes) / 1e6 for point in points]
    costs = [point.cost_nats for point in points]
    with style():
        figure, (axes,) = sheet()
        axes.plot(sizes, costs, color=SERIES[0], marker="o", markersize=3, label="the best formats at a size")
        axes.axvline(
            sensitivities.limit_bytes / 1e6, color=SOFT, linewidth=1, linestyle=(0, (3, 3)), label="the budget"
        )
        axes.set(xlabel="packed matrices, MB", title="what rounding costs by the layers' moments, nats", yscale="log")
        logarithmic(axes.yaxis, min(costs), max(costs))
        axes.legend()
        return Plot(title, "What the formats of layers were chosen from, before any tuning.", svg(figure, title))


def divergence_distribution(columns: Sequence[Column]) -> Plot | None:
    """How many tokens diverge how far, over the logarithm of nats."""
    drawn = [
        (number, column, report, model.kl_histogram)
        for number, column in enumerate(columns)
        if (report := column.findings.evaluation) and (model := column.evaluation) and model.kl_histogram
    ]
    if not drawn:
        return None
    title = "Divergence of a token"
    with style():
        figure, (axes,) = sheet()
        filled: list[float] = []
        for number, column, report, histogram in drawn:
            edges, total = report.histogram_edges_nats, sum(histogram)
            colour = colour_of(column.name, number) if _one_run(columns) else SERIES[number % len(SERIES)]
            shares = [count / total for count in histogram]
            axes.stairs(shares, edges, color=colour, linewidth=1.4, label=column.title)
            axes.stairs(shares, edges, color=colour, fill=True, alpha=0.12)
            filled += [edge for edge, count in zip(edges, histogram, strict=False) if count / total > 1e-4]
        axes.set(xscale="log", xlabel="KL from the uncompressed model, nats", title="share of tokens")
        axes.set(xlim=(min(filled) / 2, max(filled) * 3), ylim=(0, None))
        logarithmic(axes.xaxis, min(filled), max(filled))
        axes.legend()
        return Plot(title, "Further to the left is nearer to the uncompressed model.", svg(figure, title))


def _one_run(columns: Sequence[Column]) -> bool:
    return all(column.findings is columns[0].findings for column in columns)


def weight_errors(proof: VerificationReport, called: Titles) -> Plot | None:
    """The relative error of each weight matrix, first to last, of the product and its twin.

    Args:
        called: what the models are called.
    """
    rows = [(number, layer) for number, layer in enumerate(proof.layers, start=1) if layer.weight_error is not None]
    if not rows:
        return None
    title = "Weight error by layer"
    twins = [(number, layer.twin_weight_error) for number, layer in rows if layer.twin_weight_error is not None]
    errors = [(number, layer.weight_error) for number, layer in rows if layer.weight_error is not None]
    worst_number, worst = max(rows, key=lambda row: row[1].weight_error or 0.0)
    with style():
        figure, (axes,) = sheet()
        if twins:
            axes.plot(*zip(*twins, strict=True), ".", markersize=6, color=SERIES[1], label=called[PLAIN])
        axes.plot(*zip(*errors, strict=True), ".", markersize=6, color=SERIES[0], label=called[PRODUCT])
        axes.set(xlabel="weight matrix, first to last", title="share of the weights' norm")
        axes.set_ylim(0, 1.25 * max(error for _, error in (*twins, *errors)))
        axes.grid(axis="y")
        axes.annotate(
            worst.name.removesuffix(".weight"),
            (worst_number, worst.weight_error or 0.0),
            xytext=(0, 7),
            textcoords="offset points",
            ha="left" if worst_number < len(proof.layers) / 2 else "right",
            fontsize=7.5,
            color=SOFT,
        )
        axes.legend(loc="lower right", ncols=2)
        return Plot(title, "How far each matrix is from the base model's; the largest is named.", svg(figure, title))


def latencies(benchmark: BenchmarkReport) -> Plot:
    """Median latencies with a whisker to the 90th percentile, and each ratio with its interval."""
    title = "Latency"
    names = list(benchmark.models)
    first, called = names[0], titles(benchmark)
    limited = any(model.limit for model in benchmark.models.values())
    with style():
        figure, panels = sheet(height_inches=2 * (_FRAME_INCHES + _BAR_INCHES * len(names)), panels=2)
        for axes, (field, ratio_field, label) in zip(panels, _LATENCIES, strict=True):
            samples: list[Samples] = [getattr(benchmark.models[name], field) for name in names]
            _bars(axes, names, [one.median for one in samples], [one.p90 for one in samples])
            _name_rows(axes, [called[name] for name in names])
            for place, (name, one) in enumerate(zip(names, samples, strict=True)):
                ratios = benchmark.ratios.get(f"{name}/{first}")
                text = f"{written(one.median, '.2f')} ms"
                if ratios:
                    ratio = getattr(ratios, ratio_field)
                    text += f" · {with_interval(ratio.median, ratio.ci95, '.2f')} × {called[first]}"
                axes.annotate(
                    text, (one.p90, place), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8
                )
                limit = benchmark.models[name].limit
                if limit:
                    at_best = getattr(limit, field)
                    axes.plot([at_best, at_best], [place - 0.36, place + 0.36], color=INK, linewidth=1.6)
            axes.set_title(label)
            axes.set_xlim(0, 1.75 * max(one.p90 for one in samples))
        caption = "Bars are medians, whiskers reach to the 90th percentile; ratios with their 95 % interval."
        if limited:
            caption += " The line across a bar is the least time that the machine allows."
        return Plot(title, caption, svg(figure, title))


def _bars(axes: Axes, names: Sequence[str], values: Sequence[float], ends: Sequence[float]) -> None:
    """Horizontal bars with whiskers, the first on top."""
    places = range(len(names))
    colours = [colour_of(name, number) for number, name in enumerate(names)]
    whiskers = [[0.0] * len(names), [end - value for value, end in zip(values, ends, strict=True)]]
    axes.barh(places, values, height=0.6, color=colours, alpha=0.85)
    axes.errorbar(values, places, xerr=whiskers, fmt="none", ecolor=SOFT, elinewidth=1, capsize=3)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names instead of numbers, the first on top, and few enough numbers below."""
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.invert_yaxis()


def quality_against_size(columns: Sequence[Column]) -> Plot | None:
    """Mean divergence, or perplexity where there is none, against the weights' bytes; the reference diverges by 0."""
    sized = [(column, column.benchmark.weight_bytes / 1e6) for column in columns if column.benchmark]
    points = [(column, size, _divergence(column)) for column, size in sized]
    label = "mean KL from the uncompressed model, nats"
    if not any(value for _, _, value in points):
        points = [(column, size, column.evaluation.perplexity if column.evaluation else None) for column, size in sized]
        label = "perplexity per token"
    drawn = [(column, size, value) for column, size, value in points if value is not None]
    if len(drawn) < 2:
        return None
    title = "Quality against size"
    with style():
        figure, (axes,) = sheet()
        for number, (column, size, value) in enumerate(drawn):
            interval = column.evaluation.kl_mean_ci95 if column.evaluation and label.startswith("mean KL") else None
            reach = [[value - interval[0]], [interval[1] - value]] if interval else None
            colour = colour_of(column.name, number)
            axes.errorbar([size], [value], yerr=reach, fmt="o", markersize=7, color=colour, capsize=3)
            axes.annotate(column.title, (size, value), xytext=(9, 4), textcoords="offset points", fontsize=8.5)
        largest = max(size for _, size, _ in drawn)
        values = [value for _, _, value in drawn]
        axes.set(xlabel="weights on disk, MB", title=label, xlim=(0, 1.3 * largest))
        if label.startswith("mean KL"):
            axes.set_ylim(-0.06 * max(values), 1.2 * max(values))
        axes.grid()
        return Plot(title, "Further down and to the left is better.", svg(figure, title))


def _divergence(column: Column) -> float | None:
    report = column.findings.evaluation
    if report and column.name == report.reference:
        return 0.0
    return column.evaluation.kl_mean_nats if column.evaluation else None


def isolation(columns: Sequence[Column]) -> Plot | None:
    """The divergence at each step of the isolation, by model."""
    models = [(column, column.evaluation.isolation) for column in columns if column.evaluation]
    points = [
        (number, column, step.name, step.kl_mean_nats, step.kl_mean_ci95)
        for number, (column, steps) in enumerate((column, steps) for column, steps in models if steps)
        for step in steps
        if step.kl_mean_nats is not None
    ]
    if not points:
        return None
    title = "Where the divergence comes from"
    names = list(dict.fromkeys(name for _, _, name, _, _ in points))
    thick = 0.75 / (1 + max(number for number, *_ in points))
    with style():
        figure, (axes,) = sheet(height_inches=_FRAME_INCHES + 0.25 + 0.5 * len(names))
        for number, column, name, value, interval in points:
            place = names.index(name) + thick * (number - (0.75 / thick - 1) / 2)
            low, high = interval or (value, value)
            axes.barh([place], [value], height=0.9 * thick, color=colour_of(column.name, number), alpha=0.85)
            axes.errorbar([value], [place], xerr=[[value - low], [high - value]], fmt="none", ecolor=SOFT, capsize=2)
            text = f"{value:.2g} {column.title}" if name == names[0] else f"{value:.2g}"
            axes.annotate(text, (high, place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8)
        _name_rows(axes, [STEPS.get(name, name) for name in names])
        largest = max((interval or (0.0, value))[1] for *_, value, interval in points)
        axes.set(title="mean KL, nats", xlim=(0, 1.5 * largest))
        caption = "Rounding the weights, then each of the runtime's approximations on top of it, then all of them."
        return Plot(title, caption, svg(figure, title))


def memory(benchmark: BenchmarkReport) -> Plot | None:
    """Anonymous and file-backed peaks of load and generation."""
    called = titles(benchmark)
    rows = [
        (f"{called[name]}, {phase}", peak) for name, model in benchmark.models.items() for phase, peak in _phases(model)
    ]
    if not rows:
        return None
    title = "Memory"
    places = range(len(rows))
    with style():
        figure, (axes,) = sheet(height_inches=_FRAME_INCHES + 0.36 * len(rows))
        anonymous = [peak.peak_anonymous_bytes / 1e6 for _, peak in rows]
        backed = [peak.peak_file_bytes / 1e6 for _, peak in rows]
        axes.barh([place - 0.17 for place in places], anonymous, height=0.3, color=SERIES[0], label="anonymous")
        axes.barh([place + 0.17 for place in places], backed, height=0.3, color=FAINT, label="file-backed")
        for place, (_, peak) in enumerate(rows):
            total = peak.peak_rss_bytes / 1e6
            axes.plot([total, total], [place - 0.36, place + 0.36], color=INK, linewidth=1.6)
            axes.annotate(f"{total:.0f}", (total, place), xytext=(6, 0), textcoords="offset points", va="center")
        _name_rows(axes, [label for label, _ in rows])
        axes.set(title="MB at the peak", xlim=(0, 1.2 * max(peak.peak_rss_bytes for _, peak in rows) / 1e6))
        figure.legend(loc="outside lower center", ncols=2)
        caption = "The upright line is the resident peak of all together; the two kinds need not have peaked at once."
        return Plot(title, caption, svg(figure, title))


def _phases(model: ModelBenchmark) -> list[tuple[str, PeakMemory]]:
    phases = (("loading", model.load_memory), ("generating", model.generation_memory))
    return [(phase, peak) for phase, peak in phases if peak]


def grid(benchmark: BenchmarkReport) -> Plot | None:
    """The ratio of time per output token with its interval, at every point of the grid."""
    if len(benchmark.grid) < 2:
        return None
    first, called = next(iter(benchmark.models)), titles(benchmark)
    names = [name for name in benchmark.models if name != first]
    rows = [
        (point, name, point.ratios[f"{name}/{first}"].time_per_output_token)
        for point in benchmark.grid
        for name in names
        if f"{name}/{first}" in point.ratios
    ]
    if not rows:
        return None
    title = "Speed over the grid"
    labels = list(dict.fromkeys(grid_label(point) for point in benchmark.grid))
    with style():
        figure, (axes,) = sheet(height_inches=_FRAME_INCHES + 0.4 * len(labels))
        for number, name in enumerate(names):
            mine = [(labels.index(grid_label(point)), ratio) for point, other, ratio in rows if other == name]
            places = [place + 0.16 * (number - (len(names) - 1) / 2) for place, _ in mine]
            _draw_ratios(axes, [ratio for _, ratio in mine], places, colour_of(name, number), called[name])
        axes.axvline(1, color=SOFT, linewidth=1, linestyle=(0, (3, 3)))
        _name_rows(axes, labels)
        axes.set(title=f"time per output token over {called[first]}'s")
        axes.grid(axis="x")
        figure.legend(loc="outside lower center", ncols=3)
        return Plot(title, "Left of the dashed line is faster; with 95 % intervals.", svg(figure, title))


def _draw_ratios(axes: Axes, ratios: Sequence[Ratio], places: Sequence[float], colour: str, label: str) -> None:
    """A point for each ratio's median, with a bar over its interval."""
    medians = [ratio.median for ratio in ratios]
    ends = [ratio.ci95 or (ratio.median, ratio.median) for ratio in ratios]
    reach = [
        [median - low for median, (low, _) in zip(medians, ends, strict=True)],
        [high - median for median, (_, high) in zip(medians, ends, strict=True)],
    ]
    axes.errorbar(medians, places, xerr=reach, fmt="o", markersize=4.5, capsize=3, color=colour, label=label)


def grid_label(point: PointBenchmark) -> str:
    """A point of the grid in words."""
    return f"{point.prompt_tokens} → {point.output_tokens} tokens, batch {point.batch_size}, {point.attention_backend}"
