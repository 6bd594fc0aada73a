"""report.html and README.md, filled from the run's files."""

from pathlib import Path
from typing import Any

import ovexport
from ovexport import recipe as recipes
from ovexport.artifacts import RunFolder
from ovexport.errors import ArtifactError
from ovexport.recipe import Recipe
from ovexport.report import plots
from ovexport.report.answers import part
from ovexport.report.card import model_card
from ovexport.report.conditions import conditions_of
from ovexport.report.drawing import Plot
from ovexport.report.limits import promises
from ovexport.report.names import PRODUCT
from ovexport.report.proof import proof_rows
from ovexport.report.table import Column, Findings, columns_of, comparison, read_findings
from ovexport.report.templating import environment
from ovexport.report.verdict import headlines, verdict
from ovexport.storage.files import write_text
from ovexport.storage.textfile import read_text
from ovexport.versions import stack_versions
from ovexport.wording import model_named


def write_report(folder: RunFolder) -> Path:
    """Write report.html (self-contained) and README.md (the model card) into the run's folder.

    Raises:
        ArtifactError: the folder is no run, holds nothing to report yet, or a file of it is corrupt.
    """
    findings = require_findings(folder)
    recipe = recipes.load(folder.recipe)
    digests = _digests(folder, findings)
    values = _values(folder, recipe, findings) | {"digests": digests}
    page = folder.path / "report.html"
    write_text(environment().get_template("report.html").render(values), page)
    write_text(model_card(recipe, findings, digests), folder.path / "README.md")
    return page


def require_findings(folder: RunFolder) -> Findings:
    """The run's reports.

    Raises:
        ArtifactError: the folder is no run, holds nothing to report yet, or a file of it is corrupt.
    """
    if not folder.recipe.is_file():
        raise ArtifactError(f"{folder.path}: no run, it has no recipe.toml; give the folder that ovexport run wrote")
    findings = read_findings(folder)
    if not (findings.verification or findings.evaluation or findings.benchmark):
        raise ArtifactError(f"{folder.path}: nothing to report yet; ovexport run --resume goes on with it")
    return findings


def _values(folder: RunFolder, recipe: Recipe, findings: Findings) -> dict[str, Any]:
    """What the template shows."""
    columns = columns_of(findings)
    models, rows = comparison(findings)
    return {
        "title": Path(recipe.model.id).name,
        "base": model_named(recipe.model.id, recipe.model.revision, recipe.model.adapter),
        "recipe": recipe,
        "recipe_text": read_text(folder.recipe),
        "findings": findings,
        "models": models,
        "rows": rows,
        "made_with": findings.verification.versions if findings.verification else stack_versions(),
        "ovexport_version": ovexport.__version__,
        "verdict": verdict(findings),
        "headlines": headlines(findings),
        "product": next((number for number, column in enumerate(columns) if column.name == PRODUCT), None),
        "plots": _plots(folder, findings, columns),
        "isolated": [column for column in columns if column.evaluation and column.evaluation.isolation],
        "steps": plots.STEPS,
        "promises": promises(findings.benchmark) if findings.benchmark else (),
        "grid_label": plots.grid_label,
        "worst": [
            (column.title, [(answer, *part(answer)) for answer in column.evaluation.worst_answers])
            for column in columns
            if column.evaluation and column.evaluation.worst_answers
        ],
        "layers": proof_rows(findings.verification) if findings.verification else (),
        "conditions": conditions_of(findings),
        "benched": [column for column in columns if column.benchmark],
    }


def _digests(folder: RunFolder, findings: Findings) -> dict[str, str]:
    """SHA-256 of the product's files as they were verified, and of the checkpoint's as they were converted."""
    product = (
        {f"int4/{name}": digest for name, digest in findings.verification.files.items()}
        if findings.verification
        else {}
    )
    manifest = folder.ir("int4").manifest
    return product | (
        {f"checkpoint/{name}": digest for name, digest in manifest.checkpoint_files.items()} if manifest else {}
    )


def _plots(folder: RunFolder, findings: Findings, columns: tuple[Column, ...]) -> list[Plot]:
    proof, benchmark = findings.verification, findings.benchmark
    drawn = (
        plots.quality_against_size(columns),
        plots.latencies(benchmark) if benchmark else None,
        plots.divergence_distribution(columns),
        plots.tuning_curve(folder.logs / "tuning.jsonl"),
        plots.search_scatter(findings.search) if findings.search else None,
        plots.frontier(findings.sensitivities) if findings.sensitivities else None,
        plots.weight_errors(proof, findings.titles) if proof else None,
        plots.isolation(columns),
        plots.memory(benchmark) if benchmark else None,
        plots.grid(benchmark) if benchmark else None,
    )
    return [plot for plot in drawn if plot]
