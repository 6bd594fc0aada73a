"""Several runs on one page: a column for each run's product."""

from collections.abc import Sequence
from pathlib import Path

import ovexport
from ovexport.artifacts import RunFolder
from ovexport.errors import RecipeError
from ovexport.report import plots
from ovexport.report.conditions import differing_conditions
from ovexport.report.names import PRODUCT
from ovexport.report.page import require_findings
from ovexport.report.table import Column, Findings, columns_of, comparison_rows
from ovexport.report.templating import environment
from ovexport.report.verdict import verdict
from ovexport.storage.files import write_text


def write_comparison(folders: Sequence[RunFolder], page: Path) -> Path:
    """Write one self-contained page that compares the products of several runs.

    Raises:
        RecipeError: a run is given twice.
        ArtifactError: a folder is no run, holds nothing to report yet, or a file of it is corrupt; the page can't be
            written.
    """
    paths = [folder.path.resolve() for folder in folders]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise RecipeError(f"{folders[number].path}: given twice; give each run once")
    runs = dict(zip(_names(folders), map(require_findings, folders), strict=True))
    products = [Column(name, PRODUCT, findings) for name, findings in runs.items()]
    every = [column for name, findings in runs.items() for column in _columns(name, findings)]
    drawn = (plots.quality_against_size(every), plots.divergence_distribution(products))
    values = {
        "title": " and ".join(runs) if len(runs) == 2 else f"{len(runs)} runs",
        "models": list(runs),
        "rows": comparison_rows(products),
        "verdicts": {name: verdict(findings) for name, findings in runs.items()},
        "gates": {name: findings.gates for name, findings in runs.items()},
        "plots": [plot for plot in drawn if plot],
        "differing": differing_conditions(list(runs.values())),
        "ovexport_version": ovexport.__version__,
    }
    write_text(environment().get_template("compare.html").render(values), page)
    return page


def _columns(name: str, findings: Findings) -> list[Column]:
    """Every model of the run; its product has the run's name."""
    return [
        Column(name if column.name == PRODUCT else f"{column.title} of {name}", column.name, findings)
        for column in columns_of(findings)
    ]


def _names(folders: Sequence[RunFolder]) -> list[str]:
    """The folders' names; their paths where two have the same."""
    names = [folder.path.resolve().name for folder in folders]
    return [
        name if names.count(name) == 1 else str(folder.path.resolve())
        for name, folder in zip(names, folders, strict=True)
    ]
