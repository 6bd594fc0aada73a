"""`ovexport run`, and `compress` and `tune`, which stop after their stage."""

from pathlib import Path
from typing import Annotated

import typer

from ovexport.cli.output import Json, Overrides, Quiet, RecipePath, progress, reports_errors, set_up_logging

Out = Annotated[Path | None, typer.Option(help="The run's folder.  [default: runs/<recipe>]", show_default=False)]
Resume = Annotated[bool, typer.Option(help="Go on with the run in the folder; finished stages are not done again.")]
Overwrite = Annotated[bool, typer.Option(help="Remove the run that is in the folder, and begin anew.")]
Until = Annotated[str | None, typer.Option(help="The last stage to do.", show_default=False)]


@reports_errors
def run(
    recipe: RecipePath,
    out: Out = None,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    until: Until = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole way from a recipe to a verified, measured INT4 IR, or what is still missing of it.

    Example: ovexport run pipelines/demo.toml --set tune.steps=200
    """
    _run(recipe, out, overrides, resume=resume, overwrite=overwrite, until=until, as_json=as_json, quiet=quiet)


@reports_errors
def compress(
    recipe: RecipePath,
    out: Out = None,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose every layer's format and starting codes: the run up to the stage compress.

    Example: ovexport compress pipelines/demo.toml --out runs/demo
    """
    _run(recipe, out, overrides, resume=resume, overwrite=overwrite, until="compress", as_json=as_json, quiet=quiet)


@reports_errors
def tune(
    recipe: RecipePath,
    out: Out = None,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tune adapters and scales: the run up to the stage tune.

    Example: ovexport tune pipelines/demo.toml --out runs/demo --resume
    """
    _run(recipe, out, overrides, resume=resume, overwrite=overwrite, until="tune", as_json=as_json, quiet=quiet)


def _run(
    recipe: Path,
    out: Path | None,
    overrides: list[str] | None,
    *,
    resume: bool,
    overwrite: bool,
    until: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    from ovexport import pipeline
    from ovexport import recipe as recipes

    loaded = recipes.load(recipe, overrides or ())
    folder = out or Path("runs") / recipe.stem
    quiet = quiet or as_json
    set_up_logging(quiet=quiet)

    def announce(stage: str, skipped: bool) -> None:
        if stage == "prepare":
            set_up_logging(quiet=quiet, file=folder / "logs" / "run.log")
        if not quiet:
            typer.echo(f"{stage}{'  (done before)' if skipped else ''}", err=True)

    with progress(quiet=quiet) as listener:
        done = pipeline.run(
            loaded, folder, resume=resume, overwrite=overwrite, until=until, listener=listener, announce=announce
        )
    _show(done.path, as_json=as_json, quiet=quiet)


def _show(folder: Path, *, as_json: bool, quiet: bool) -> None:
    """The run's figures: one table that a person understands, or one document."""
    import json

    from ovexport.artifacts import RunFolder
    from ovexport.cli.output import print_table
    from ovexport.report.table import comparison, read_findings

    findings = read_findings(RunFolder(folder))
    if as_json:
        reports = {name: getattr(findings, name) for name in ("verification", "evaluation", "benchmark")}
        document = {name: report.model_dump(mode="json") if report else None for name, report in reports.items()}
        typer.echo(json.dumps({"folder": str(folder), **document}))
        return
    if quiet:
        return
    names, rows = comparison(findings)
    if rows:
        print_table(("", *names), [(row.figure, *row.values) for row in rows])
    if findings.verification:
        counts = findings.verification.summary
        typer.echo(
            f"verified: {len(findings.verification.checks)} checks; {counts.packed_int4} Linear layers in 4 bits, "
            f"{counts.packed_int8} in 8, {counts.float} in floating point; {counts.code_mismatches} codes differ from "
            f"the tuned ones; {counts.adapter_nodes} adapter operations left"
        )
    if findings.evaluation and findings.evaluation.recovered_gap is not None:
        encoder = findings.evaluation.conditions["encoder"]
        typer.echo(
            f"tuning took away {findings.evaluation.recovered_gap:.0%} of the divergence that rounding had caused; "
            f"similarity by the encoder {encoder}"
        )
    product, page = folder / "int4", folder / "report.html"
    if (product / "openvino_model.xml").is_file():
        typer.echo(f"the product: {product}")
    if page.is_file():
        typer.echo(f"the report: {page}")
