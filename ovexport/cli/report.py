"""`ovexport report`."""

from pathlib import Path
from typing import Annotated

import typer

from ovexport.cli.gates import Gates, JUnit, check_junit, conclude, require_gates
from ovexport.cli.output import Json, Quiet, reports_errors, say, set_up_logging


@reports_errors
def report(
    runs: Annotated[list[Path], typer.Argument(help="A run's folder; several are compared.", metavar="RUN...")],
    out: Annotated[
        Path | None,
        typer.Option(help="The page that compares several runs.  [default: compare.html]", show_default=False),
    ] = None,
    gates: Gates = None,
    junit: JUnit = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rebuild report.html and the model card from a run's files, or compare several runs on one page.

    Example: ovexport report runs/demo

    Example: ovexport report runs/demo runs/demo-g128 --out compare.html
    """
    from ovexport.artifacts import RunFolder
    from ovexport.errors import RecipeError
    from ovexport.pipeline import services
    from ovexport.report.compare import write_comparison

    set_up_logging(quiet=quiet or as_json)
    if junit is not None and junit.is_dir():
        raise RecipeError(f"--junit {junit}: a folder; give a file's name")
    folders, verdict = [RunFolder(run) for run in runs], None
    if len(folders) > 1:
        if gates or junit:
            raise RecipeError("--gate and --junit go with one run; judge the others one by one")
        page = write_comparison(folders, out or Path("compare.html"))
    elif out is None:
        page, verdict = services.rebuild_report(folders[0], gates or ())
        check_junit(junit, gated=verdict is not None)
    else:
        raise RecipeError(f"--out {out}: goes with several runs; the report of one is in its own folder")
    document = {"page": str(page)} if as_json else None
    conclude(verdict, command="report", junit=junit, document=document, quiet=quiet)
    if not (quiet or as_json):
        say(str(page))
    require_gates(verdict)
