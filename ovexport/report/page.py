"""report.html and README.md, filled from the run's files."""

import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

import ovexport
from ovexport import recipe as recipes
from ovexport.artifacts import RunFolder, write_text
from ovexport.errors import ArtifactError
from ovexport.report import plots
from ovexport.report.table import Findings, comparison, read_findings
from ovexport.versions import stack_versions


def write_report(folder: RunFolder) -> Path:
    """Write report.html (self-contained) and README.md (the model card) into the run's folder.

    Raises:
        ArtifactError: the folder is no run, holds nothing to report yet, or a file of it is corrupt.
    """
    if not folder.recipe.is_file():
        raise ArtifactError(f"{folder.path}: no run, it has no recipe.toml; give the folder that ovexport run wrote")
    findings = read_findings(folder)
    if not (findings.verification or findings.evaluation or findings.benchmark):
        raise ArtifactError(f"{folder.path}: nothing to report yet; ovexport run --resume goes on with it")
    environment = Environment(
        loader=PackageLoader("ovexport.report"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    recipe = recipes.load(folder.recipe)
    names, rows = comparison(findings)
    values = {
        "title": Path(recipe.model.id).name,
        "recipe": recipe,
        "recipe_text": folder.recipe.read_text(encoding="utf-8"),
        "findings": findings,
        "models": names,
        "rows": rows,
        "plots": _plots(folder, findings),
        "conditions": _conditions(findings),
        "digests": _digests(folder, findings),
        "versions": stack_versions(),
        "made_with": findings.verification.versions if findings.verification else stack_versions(),
        "base": recipe.model.id + (f" at {recipe.model.revision}" if recipe.model.revision else ""),
        "ovexport_version": ovexport.__version__,
    }
    page = folder.path / "report.html"
    write_text(environment.get_template("report.html").render(values), page)
    write_text(environment.get_template("card.md").render(values), folder.path / "README.md")
    return page


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


def _plots(folder: RunFolder, findings: Findings) -> dict[str, str]:
    drawn = {
        "Tuning": plots.tuning_curve(folder.logs / "tuning.jsonl"),
        "Search of ranks": plots.search_scatter(findings.search) if findings.search else None,
        "Divergence of a token": plots.divergence_distribution(findings.evaluation) if findings.evaluation else None,
        "Latency": plots.latency_bars(findings.benchmark) if findings.benchmark else None,
    }
    return {title: svg for title, svg in drawn.items() if svg is not None}


def _conditions(findings: Findings) -> dict[str, str]:
    reports = {"evaluation": findings.evaluation, "benchmark": findings.benchmark}
    return {name: json.dumps(report.conditions, indent=2) for name, report in reports.items() if report}
