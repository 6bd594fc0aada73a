"""`ovexport verify`."""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ovexport.reports import LayerRow, VerificationReport

from ovexport.cli.output import Json, Quiet, print_table, progress, reports_errors, set_up_logging

_MOST_NOTES = 3


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
        _print_layers(report)
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


def _print_layers(report: "VerificationReport") -> None:
    """What the IR is made of: layers that are alike in one row, and the largest that are not packed to 4 bits."""
    kinds: dict[tuple[str, str, int], list[LayerRow]] = {}
    for layer in report.layers:
        kinds.setdefault((layer.kind, layer.element_type, layer.group_size), []).append(layer)
    rows = []
    for (kind, element, group), layers in sorted(kinds.items()):
        size, elements = sum(layer.weight_bytes for layer in layers), sum(prod(layer.shape) for layer in layers)
        read = f"{size / 1e6:.2f}" if kind == "linear" else "a row"
        figures = (f"{8 * size / elements:.2f}", f"{size / 1e6:.2f}", read, f"{elements / 2e6:.2f}")
        rows.append((kind, element, str(group or "–"), str(len(layers)), *figures))
    print_table(("layer", "type", "group", "count", "bits per weight", "MB", "MB per token", "4-bit codes, MB"), rows)
    beyond = sorted((layer for layer in report.layers if layer.note), key=lambda layer: -layer.weight_bytes)
    for layer in beyond[:_MOST_NOTES]:
        typer.echo(f"{layer.name}: {layer.note}")
    if len(beyond) > _MOST_NOTES:
        typer.echo(f"and {len(beyond) - _MOST_NOTES} smaller ones that are not packed to 4 bits (--json lists them)")
    typer.echo(f"every generated token reads {report.summary.bytes_read_per_token / 1e6:.2f} MB of weights")
