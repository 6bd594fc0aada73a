"""`ovexport convert`."""

from pathlib import Path
from typing import Annotated

import typer

from ovexport.cli.output import Json, Quiet, print_json, reports_errors, say, set_up_logging, whole_numbers

CheckpointPath = Annotated[
    Path,
    typer.Argument(
        help="A tuned checkpoint: a folder with checkpoint.json, a file that NNCF's examples saved, or what a plug-in "
        "reads. Or a model's folder whose weights are 4-bit codes already (GPTQ, AWQ, AutoRound, compressed-tensors)."
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="The base model: a folder or a hub id. Left out where the checkpoint is a model of its own.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the INT4 IR.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the hub id.", show_default=False)]
Ranks = Annotated[
    str | None,
    typer.Option(
        help='Of an FQ_LORA_NLS file\'s adapters: one number, or one per block, as "32 24 16".  [default: the largest]',
        show_default=False,
    ),
]
Keep = Annotated[
    Path | None,
    typer.Option(
        help="Folder for what verify compares the IR with: bf16, and the checkpoint if it was a file.",
        show_default=False,
    ),
]


@reports_errors
def convert(
    checkpoint: CheckpointPath,
    out: Out,
    model: Model = None,
    revision: Revision = None,
    ranks: Ranks = None,
    keep: Keep = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A tuned checkpoint to an INT4 IR, its adapters absorbed; or a model in 4 bits, with its own codes.

    Example: ovexport convert runs/demo/checkpoint --model models/storyteller-4m --out storyteller-int4

    Example: ovexport convert nncf_checkpoint.pth --model Qwen/Qwen2.5-3B-Instruct --out int4 --ranks 24 --keep proof

    Example: ovexport convert Qwen2.5-3B-Instruct-AWQ --out int4
    """
    from ovexport.pipeline import services
    from ovexport.recipe import ConvertSpec, ModelSpec

    set_up_logging(quiet=quiet or as_json)
    spec = None if model is None else ModelSpec(id=model, revision=revision)
    given = None if ranks is None else whole_numbers(ranks, "--ranks")
    ir = services.convert_checkpoint(checkpoint, spec, ConvertSpec(), out, ranks=given, keep=keep)
    if as_json:
        import json

        print_json(json.dumps({"ir": str(ir.path), "weight_bytes": ir.weight_bytes}))
    elif not quiet:
        say(f"{ir.path}: {ir.weight_bytes / 1e6:.2f} MB of weights")
