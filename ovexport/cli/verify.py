"""`ovexport verify`."""

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ovexport.reports import Check, LayerRow, VerificationReport

from ovexport.cli.gates import Gates, JUnit, conclude, judged, read_gates, require_gates
from ovexport.cli.output import Json, Quiet, print_table, progress, reports_errors, say, set_up_logging

_MOST_NOTES = 3


Ir = Annotated[Path, typer.Argument(help="Folder of the IR to prove.")]
CheckpointFolder = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint",
        help="Folder of the checkpoint that was tuned, or of the model in 4 bits that was converted.",
        show_default=False,
    ),
]
Base = Annotated[
    Path | None,
    typer.Option(help="Folder of the baseline IR.  [default: bf16 beside the checkpoint]", show_default=False),
]
Twin = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the plain IR: the same compression, not tuned.  [default: plain beside the checkpoint]",
        show_default=False,
    ),
]
Runtime = Annotated[bool, typer.Option(help="Compile the IR and check the graph that the runtime executes.")]


@reports_errors
def verify(
    ir: Ir,
    checkpoint: CheckpointFolder = None,
    base: Base = None,
    twin: Twin = None,
    runtime: Runtime = True,
    gates: Gates = None,
    junit: JUnit = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The proof of any OpenVINO LLM IR; without a checkpoint it describes the graph and proves nothing.

    Example: ovexport verify runs/demo/int4 --checkpoint runs/demo/checkpoint
    """
    from ovexport.errors import VerificationFailed

    set_up_logging(quiet=quiet or as_json)
    asked = read_gates(gates, junit, ("verification",))
    report = _prove(ir, checkpoint, base, twin, runtime=runtime, quiet=quiet or as_json)
    if not (as_json or quiet):
        if checkpoint is None:
            _print_layers(report)
        print_verdict(report)
    verdict = judged(asked, {"verification": report})
    document = report.model_dump(mode="json") if as_json else None
    conclude(verdict, command="verify", junit=junit, document=document, quiet=quiet)
    if not report.passed:
        raise VerificationFailed(f"{ir}: verification failed", report)
    require_gates(verdict)


def _prove(
    ir: Path, checkpoint: Path | None, base: Path | None, twin: Path | None, *, runtime: bool, quiet: bool
) -> "VerificationReport":
    """The proof, with what lies beside the checkpoint where no baseline and no plain IR are given."""
    from ovexport.artifacts import IR, Checkpoint
    from ovexport.errors import RecipeError
    from ovexport.verify import is_onnx_folder, is_packed_folder, prove_onnx
    from ovexport.verify import verify as prove

    if is_onnx_folder(ir):
        if checkpoint is None or base or twin:
            raise RecipeError(
                f"{ir}: an ONNX product is compared with its checkpoint alone; give --checkpoint, no --base or --twin"
            )
        return prove_onnx(ir, Checkpoint(checkpoint), runtime=runtime)

    packed = checkpoint if checkpoint is not None and is_packed_folder(checkpoint) else None
    checkpoint = None if packed else checkpoint
    if checkpoint is not None:
        base, twin = base or _beside(checkpoint, "bf16", ir), twin or _beside(checkpoint, "plain", ir)
    with progress(quiet=quiet) as listener:
        return prove(
            IR(ir),
            checkpoint=Checkpoint(checkpoint) if checkpoint else None,
            base=IR(base) if base else None,
            twin=IR(twin) if twin else None,
            packed=packed,
            runtime=runtime,
            listener=listener,
        )


def _beside(checkpoint: Path, name: str, ir: Path) -> Path | None:
    """A run's folder that lies beside its checkpoint; None where there is none, or where it is the IR itself."""
    folder = checkpoint.absolute().parent / name
    return folder if folder.is_dir() and folder.resolve() != ir.resolve() else None


def print_verdict(report: "VerificationReport") -> None:
    """The verdict, a line for each sort of evidence, what failed, and what could not be checked."""
    passed = sum(check.passed for check in report.checks)
    say(f"{report.heading}  {report.subject}: {passed} of {len(report.checks)} checks passed")
    for line in _evidence(report):
        say(f"  {line}")
    failed: dict[str, list[Check]] = {}
    for check in report.checks:
        if not check.passed:
            failed.setdefault(check.name, []).append(check)
    for name, checks in failed.items():
        first = checks[0]
        more = f" and {len(checks) - 1} more" if len(checks) > 1 else ""
        say(f"  failed      {name}: {first.subject}{more}: {first.detail or f'{first.value}, not {first.limit}'}")
    for note in report.notes:
        say(f"  note        {note}")
    for reason in (report.summary.reason or "").split("; "):
        if reason:
            say(f"  not checked: {reason}")


def _evidence(report: "VerificationReport") -> Iterator[str]:
    """A line for each sort of evidence."""
    summary = report.summary
    if summary.code_mismatches is not None:
        yield (
            f"arithmetic  {summary.code_mismatches} codes, {summary.scale_mismatches} scales and "
            f"{summary.zero_point_mismatches} zero points differ from a second computation"
        )
    for check in report.checks:
        if check.name == "logits as the checkpoint's" and check.passed:
            yield f"behaviour   logits are the checkpoint's to {check.value:.1e} of their range, ≤ {check.limit:.1e}"
    if summary.runtime_packed_linears is not None:
        packed = summary.packed_int4 + summary.packed_int8
        yield f"runtime     {summary.runtime_packed_linears} of {packed} packed Linears run on packed weights"
    if summary.bits_per_weight is not None:
        read = summary.bytes_read_per_token / 1e6
        yield f"weights     {summary.bits_per_weight:.3f} bits each; a generated token reads {read:.2f} MB of them"


def _print_layers(report: "VerificationReport") -> None:
    """What the IR is made of: layers that are alike in one row, and the largest that are not packed to 4 bits."""
    alike: dict[tuple[str, str, int], list[LayerRow]] = {}
    for layer in report.layers:
        alike.setdefault((layer.kind, layer.element_type, layer.group_size), []).append(layer)
    rows = []
    for (layer_kind, element_type, group), layers in sorted(alike.items()):
        size, elements = sum(layer.weight_bytes for layer in layers), sum(prod(layer.shape) for layer in layers)
        read = f"{size / 1e6:.2f}" if layer_kind == "linear" else "a row"
        figures = (f"{8 * size / elements:.2f}", f"{size / 1e6:.2f}", read, f"{elements / 2e6:.2f}")
        rows.append((layer_kind, element_type, str(group or "–"), str(len(layers)), *figures))
    print_table(("layer", "type", "group", "count", "bits per weight", "MB", "MB per token", "at 4 bits, MB"), rows)
    beyond = sorted((layer for layer in report.layers if layer.note), key=lambda layer: -layer.weight_bytes)
    for layer in beyond[:_MOST_NOTES]:
        say(f"{layer.name}: {layer.note}")
    if len(beyond) > _MOST_NOTES:
        say(f"and {len(beyond) - _MOST_NOTES} smaller ones that are not packed to 4 bits (--json lists them)")
