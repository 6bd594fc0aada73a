"""`ovexport doctor`."""

from typing import Annotated

import typer

from ovexport.cli.output import Json, Quiet, print_json, print_table, reports_errors, set_up_logging


@reports_errors
def doctor(
    target: Annotated[
        bool, typer.Option("--target", help="Check only what verify, bench and runtime need on a target device.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """This machine and installation: versions that clash, instruction sets, what is missing and how to get it.

    Example: ovexport doctor
    """
    from ovexport.doctor import examine
    from ovexport.errors import MissingDependencyError

    set_up_logging(quiet=quiet or as_json)
    diagnosis = examine(target=target)
    if as_json:
        print_json(diagnosis.model_dump_json())
    elif not quiet:
        rows = [(line.subject, line.finding, "" if line.fine else line.cure or "") for line in diagnosis.lines]
        print_table(("subject", "found", "cure"), rows)
    problems = [line for line in diagnosis.lines if not line.fine and line.required]
    if problems:
        raise MissingDependencyError("; ".join(f"{line.subject}: {line.finding}; {line.cure}" for line in problems))
