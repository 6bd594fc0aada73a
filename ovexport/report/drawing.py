"""How every plot looks: colours that follow the page's light and dark, text that stays text, small SVG."""

import io
import re
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

INK, SOFT, RULE = "#1c2430", "#59636e", "#d7dde2"
SERIES = ("#0068b5", "#c27c0e", "#5f6b76", "#2f855a", "#8a4fbf", "#b83a4b")
FAINT = "#9cc4e4"
_OF_MODELS = {"int4": SERIES[0], "plain": SERIES[1], "bf16": SERIES[2]}
_VARIABLES = {INK: "ink", SOFT: "soft", RULE: "rule", FAINT: "faint"} | {
    colour: f"series-{number}" for number, colour in enumerate(SERIES, start=1)
}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
}
_WIDTH_INCHES = 5.6
_DECADES_WITH_STEPS = 2.5


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawn plot.

    Attributes:
        caption: how to read it, in a sentence.
        svg: the element's text.
    """

    title: str
    caption: str
    svg: str


def style() -> Any:
    """A context in which figures are made and turned to SVG."""
    return matplotlib.rc_context(_STYLE)


def sheet(*, height_inches: float = 3.0, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with panels one below the other."""
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def colour_of(name: str, number: int = 0) -> str:
    """A model's colour; one by its number where the name has none of its own."""
    return _OF_MODELS.get(name, SERIES[(number + len(_OF_MODELS)) % len(SERIES)])


def logarithmic(axis: Any, low: float, high: float) -> None:
    """Ticks of a logarithmic axis in plain numbers; 1, 2, 3, 5 of each decade where there are few decades."""
    steps = (1.0, 2.0, 3.0, 5.0) if high / low < 10**_DECADES_WITH_STEPS else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def svg(figure: Figure, title: str) -> str:
    """The figure as an element of the page: an image with a name, its colours the page's variables.

    Args:
        title: in plain words; no two plots of a page have the same.
    """
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(text, format="svg", transparent=True, metadata={**nothing, "Title": title})
    element = text.getvalue()[text.getvalue().index("<svg") :]
    element = re.sub(r'<g id="[^"]*"', "<g", element)
    element = re.sub("|".join(_VARIABLES), lambda match: f"var(--{_VARIABLES[match.group()]})", element)
    name = "plot-" + re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    element = element.replace("<title>", f'<title id="{name}">', 1)
    return element.replace("<svg ", f'<svg role="img" aria-labelledby="{name}" ', 1)
