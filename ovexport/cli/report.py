"""`ovexport report`."""

from pathlib import Path
from typing import Annotated

import typer

from ovexport.cli.output import Quiet, reports_errors, set_up_logging


@reports_errors
def report(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    quiet: Quiet = False,
) -> None:
    """Rebuild report.html and the model card from the run's files.

    Example: ovexport report runs/demo
    """
    from ovexport.artifacts import RunFolder
    from ovexport.report import write_report

    set_up_logging(quiet=quiet)
    page = write_report(RunFolder(run))
    if not quiet:
        typer.echo(str(page))
