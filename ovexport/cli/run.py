"""`ovexport run`, and `compress` and `tune`, which stop after their stage."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ovexport.cli.gates import Gates, JUnit, check_junit, conclude
from ovexport.cli.output import Json, Overrides, Quiet, RecipePath, progress, reports_errors, say, set_up_logging

if TYPE_CHECKING:
    from ovexport.errors import OvexportError
    from ovexport.publish import Destination, Upload
    from ovexport.recipe import Recipe
    from ovexport.report.table import Findings

Out = Annotated[Path | None, typer.Option(help="The run's folder.  [default: runs/<recipe>]", show_default=False)]
Resume = Annotated[bool, typer.Option(help="Go on with the run in the folder; finished stages are not done again.")]
Overwrite = Annotated[bool, typer.Option(help="Remove the run that is in the folder, and start over.")]
Until = Annotated[str | None, typer.Option(help="The last stage to do.", show_default=False)]
PushToHub = Annotated[
    str | None,
    typer.Option(
        metavar="ORG/NAME",
        help="Upload the product, its card and its reports to this model repository, once all is proven and every "
        "gate kept.",
        show_default=False,
    ),
]
Private = Annotated[bool, typer.Option("--private", help="With --push-to-hub: make a new repository private.")]
Revision = Annotated[
    str | None,
    typer.Option(help="With --push-to-hub: the branch, made where there is none.", show_default=False),
]
AllowPartial = Annotated[
    bool, typer.Option("--allow-partial", help="With --push-to-hub: upload a product that is only partly proven too.")
]


@reports_errors
def run(
    recipe: RecipePath,
    out: Out = None,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    until: Until = None,
    gates: Gates = None,
    junit: JUnit = None,
    push_to_hub: PushToHub = None,
    private: Private = False,
    revision: Revision = None,
    allow_partial: AllowPartial = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole way from a recipe to a verified, measured INT4 IR, or what is still missing of it.

    Example: ovexport run pipelines/demo.toml --set tune.steps=200 --gate "similarity>=0.9"
    """
    _run(
        recipe,
        out,
        overrides,
        resume=resume,
        overwrite=overwrite,
        until=until,
        gates=gates,
        junit=junit,
        destination=_destination(
            push_to_hub, private=private, revision=revision, allow_partial=allow_partial, until=until
        ),
        as_json=as_json,
        quiet=quiet,
    )


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
    """Tune adapters and scales, and search their ranks if they are elastic: the run up to the stage search.

    Example: ovexport tune pipelines/demo.toml --out runs/demo --resume
    """
    _run(recipe, out, overrides, resume=resume, overwrite=overwrite, until="search", as_json=as_json, quiet=quiet)


def _destination(
    repository: str | None, *, private: bool, revision: str | None, allow_partial: bool, until: str | None
) -> "Destination | None":
    """Where to upload to, from the options.

    Raises:
        RecipeError: they do not go together, or a name can't be.
    """
    from ovexport.errors import RecipeError

    if repository is None:
        options = {"--private": private, "--revision": revision is not None, "--allow-partial": allow_partial}
        for option in (name for name, given in options.items() if given):
            raise RecipeError(f"{option}: goes with --push-to-hub ORG/NAME; add it")
        return None
    if until is not None:
        raise RecipeError(f"--until {until}: a whole run alone is uploaded; leave it out, or --push-to-hub")
    from ovexport.publish import Destination

    return Destination(repository=repository, private=private, revision=revision, allow_partial=allow_partial)


def _run(
    recipe_path: Path,
    out: Path | None,
    overrides: list[str] | None,
    *,
    resume: bool,
    overwrite: bool,
    until: str | None,
    gates: list[str] | None = None,
    junit: Path | None = None,
    destination: "Destination | None" = None,
    as_json: bool,
    quiet: bool,
) -> None:
    from ovexport import recipe as recipes

    recipe = recipes.with_gates(recipes.load(recipe_path, overrides or ()), gates or ())
    check_junit(junit, gated=bool(recipe.gates))
    folder = out or Path("runs") / recipe_path.stem
    quiet = quiet or as_json
    set_up_logging(quiet=quiet)
    if destination:
        _check_upload(destination, recipe)
    failed = _carry_out(recipe, folder, resume=resume, overwrite=overwrite, until=until, quiet=quiet)
    uploaded = None
    if destination and not failed:
        uploaded, failed = _upload(folder, destination, quiet=quiet)
    judged = until in (None, "report")
    if recipe.gates and not (judged or quiet):
        say("the gates are judged by the stage report", err=True)
    _show(folder, judged=judged, junit=junit, uploaded=uploaded, as_json=as_json, quiet=quiet)
    if failed:
        raise failed


def _carry_out(
    recipe: "Recipe", folder: Path, *, resume: bool, overwrite: bool, until: str | None, quiet: bool
) -> "OvexportError | None":
    """Run the stages; a failed gate is returned, so that the figures are shown before it is raised."""
    from ovexport.errors import GateFailed
    from ovexport.pipeline import services

    def announce(stage: str, skipped: bool) -> None:
        if stage == "prepare":
            set_up_logging(quiet=quiet, file=folder / "logs" / "run.log")
        if not quiet:
            say(f"{stage}{'  (done before)' if skipped else ''}", err=True)

    try:
        with progress(quiet=quiet) as listener:
            services.run(
                recipe, folder, resume=resume, overwrite=overwrite, until=until, listener=listener, announce=announce
            )
    except GateFailed as error:
        return error
    return None


def _check_upload(destination: "Destination", recipe: "Recipe") -> None:
    """Refuse an upload that can't succeed, before any work."""
    from ovexport.publish import check_destination, check_proof

    check_proof(destination, recipe.verify)
    check_destination(destination)


def _upload(folder: Path, destination: "Destination", *, quiet: bool) -> "tuple[Upload | None, OvexportError | None]":
    """Upload the run's product; an error is returned, so that the figures are shown before it is raised."""
    import sys

    from ovexport.artifacts import RunFolder
    from ovexport.errors import OvexportError
    from ovexport.publish import upload

    try:
        return upload(RunFolder(folder), destination, show_progress=sys.stderr.isatty() and not quiet), None
    except OvexportError as error:
        return None, error


def _show(
    folder: Path, *, judged: bool, junit: Path | None, uploaded: "Upload | None", as_json: bool, quiet: bool
) -> None:
    """The run's figures: one table that a person understands, or one document; and its gates, where they were judged.

    Args:
        junit: takes the gates too.
    """
    from dataclasses import asdict

    from ovexport.artifacts import RunFolder
    from ovexport.report.table import read_findings

    findings = read_findings(RunFolder(folder))
    document = None
    if as_json:
        reports = {name: getattr(findings, name) for name in ("verification", "evaluation", "benchmark")}
        figures = {name: report.model_dump(mode="json") if report else None for name, report in reports.items()}
        document = {"folder": str(folder), **figures, "upload": asdict(uploaded) if uploaded else None}
    elif not quiet:
        print_figures(findings)
    verdict = findings.gates if judged else None
    conclude(verdict, command="run", junit=junit, document=document, quiet=quiet)
    product, page = folder / "int4", folder / "report.html"
    if not quiet and (product / "openvino_model.xml").is_file():
        say(f"the product: {product}")
    if not quiet and page.is_file():
        say(f"the report: {page}")
    if not quiet and uploaded:
        say(f"uploaded: {uploaded.url} (commit {uploaded.commit})")


def print_figures(findings: "Findings") -> None:
    """The table of the run's figures, and whether it was tuned."""
    from ovexport.cli.output import print_table
    from ovexport.numbers import with_interval
    from ovexport.report.names import NOT_TUNED
    from ovexport.report.table import comparison

    names, rows = comparison(findings)
    if rows:
        print_table(("", *names), [(row.figure, *row.values) for row in rows])
    if findings.verification:
        counts = findings.verification.summary
        say(
            f"{findings.verification.told}; {counts.packed_int4} Linear layers in 4 bits, "
            f"{counts.packed_int8} in 8, {counts.float} in floating point; {counts.code_mismatches} codes differ from "
            f"the checkpoint's; {counts.adapter_nodes} adapter operations left"
        )
    if findings.tuned is False:
        say(f"not tuned: {NOT_TUNED}")
    if findings.evaluation and findings.evaluation.recovered_gap is not None:
        gap = with_interval(findings.evaluation.recovered_gap, findings.evaluation.recovered_gap_ci95, ".0%")
        encoder = findings.evaluation.conditions["encoder"]
        say(
            f"tuning recovered {gap} of what 4-bit rounding lost (KL divergence, 95 % interval); similarity by the "
            f"encoder {encoder}"
        )
