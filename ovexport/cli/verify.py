"""`ovexport verify`."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from ovexport.cli.output import Json, Quiet, print_table, progress, reports_errors, set_up_logging


@reports_errors
def verify(
    ir: Annotated[Path, typer.Argument(help="Folder of the IR to prove.")],
    checkpoint: Annotated[Path | None, typer.Option(help="What was tuned.", show_default=False)] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="IR of the uncompressed model.  [default: bf16 beside the checkpoint]", show_default=False),
    ] = None,
    twin: Annotated[Path | None, typer.Option(help="The same compression, not tuned.", show_default=False)] = None,
    runtime: Annotated[bool, typer.Option(help="Compile the IR and look at what is executed.")] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The proof of any OpenVINO LLM IR; without a checkpoint it proves what the graph alone can show.

    Example: ovexport verify runs/demo/int4 --checkpoint runs/demo/checkpoint --twin runs/demo/plain
    """
    from ovexport.artifacts import IR, Checkpoint
    from ovexport.errors import VerificationFailed
    from ovexport.verify import verify as prove

    set_up_logging(quiet=quiet or as_json)
    if base is None and checkpoint is not None and (checkpoint.absolute().parent / "bf16").is_dir():
        base = checkpoint.absolute().parent / "bf16"
    with progress(quiet=quiet or as_json) as listener:
        report = prove(
            IR(ir),
            checkpoint=Checkpoint(checkpoint) if checkpoint else None,
            base=IR(base) if base else None,
            twin=IR(twin) if twin else None,
            runtime=runtime,
            listener=listener,
        )
    if as_json:
        typer.echo(report.model_dump_json())
    elif not quiet:
        kinds = Counter((layer.kind, layer.element_type, layer.group_size) for layer in report.layers)
        rows = [(kind, element, str(group), str(count)) for (kind, element, group), count in sorted(kinds.items())]
        print_table(("layer", "type", "group", "count"), rows)
        failed = [check for check in report.checks if not check.passed]
        for check in failed:
            found = f"{check.name}: {check.subject}: {check.value}, not {check.limit}"
            typer.echo(f"FAILED  {found}  {check.detail}".rstrip())
        passed, bits = len(report.checks) - len(failed), report.summary.bits_per_weight
        typer.echo(
            f"{passed} of {len(report.checks)} checks passed" + (f"; {bits:.3f} bits per weight" if bits else "")
        )
        if report.summary.reason:
            typer.echo(f"not proven: {report.summary.reason}")
    if not report.passed:
        raise VerificationFailed(f"{ir}: verification failed", report)
