"""`ovexport convert`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ovexport.cli.output import Json, Quiet, print_json, reports_errors, say, set_up_logging, whole_numbers

if TYPE_CHECKING:
    from ovexport.artifacts import IR

CheckpointPath = Annotated[
    Path,
    typer.Argument(
        help="A tuned checkpoint: a folder with checkpoint.json, a file that NNCF's examples saved, a folder with a "
        "LoRA adapter that PEFT saved, or what a plug-in reads. Or a model's folder whose weights are 4-bit codes "
        "already (GPTQ, AWQ, AutoRound, compressed-tensors)."
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="The base model: a folder or a hub id. Left out where the checkpoint is a model of its own.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the product.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the hub id.", show_default=False)]
Adapter = Annotated[
    str | None,
    typer.Option(
        help="A LoRA adapter of PEFT's that was merged with the base model before the checkpoint was tuned.",
        show_default=False,
    ),
]
Ranks = Annotated[
    str | None,
    typer.Option(
        help='Of an FQ_LORA_NLS file\'s adapters: one number, or one per block, as "32 24 16".  [default: the largest]',
        show_default=False,
    ),
]
ZeroPoints = Annotated[
    Literal["float16", "codes"] | None,
    typer.Option(
        "--zero-points",
        help="Of a QA-LoRA adapter: the type of the zero points that take it up. With codes the IR is like any other "
        "INT4 model, and a part of the adapter is rounded away.  [default: float16]",
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
Format = Annotated[
    Literal["openvino", "onnx", "peft", "nncf"],
    typer.Option(
        "--format",
        help="openvino: the INT4 IR. onnx: an ONNX model with the same codes. peft: PEFT's LoftQ layout, a float model "
        "with the codes' values and its adapter in loftq_init. nncf: a file as NNCF's examples save it, whose codes "
        "nncf.strip packs; --out is the file.",
    ),
]


@reports_errors
def convert(
    checkpoint: CheckpointPath,
    out: Out,
    model: Model = None,
    revision: Revision = None,
    adapter: Adapter = None,
    ranks: Ranks = None,
    zero_points: ZeroPoints = None,
    keep: Keep = None,
    file_format: Format = "openvino",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A tuned checkpoint, or a model in 4 bits, to an INT4 IR: adapters absorbed, codes kept.

    A LoRA adapter of PEFT's stays beside the IR, for the runtime to add.

    Example: ovexport convert runs/demo/checkpoint --model models/storyteller-4m --out storyteller-int4

    Example: ovexport convert nncf_checkpoint.pth --model Qwen/Qwen2.5-3B-Instruct --out int4 --ranks 24 --keep proof

    Example: ovexport convert lora-folder --model Qwen/Qwen2.5-3B-Instruct --out int4

    Example: ovexport convert Qwen2.5-3B-Instruct-AWQ --out int4

    Example: ovexport convert qalora-folder --model Qwen2.5-3B-Instruct-GPTQ --out int4

    Example: ovexport convert runs/demo/checkpoint --model models/storyteller-4m --out storyteller-onnx --format onnx
    """
    import json

    from ovexport.pipeline import services
    from ovexport.recipe import ConvertSpec, ModelSpec

    set_up_logging(quiet=quiet or as_json)
    spec = None if model is None else ModelSpec(id=model, revision=revision, adapter=adapter)
    given = None if ranks is None else whole_numbers(ranks, "--ranks")
    if file_format in ("peft", "nncf"):
        _require_unused(file_format, {"--ranks": ranks, "--zero-points": zero_points, "--keep": keep})
        write = {"peft": services.write_peft_folder, "nncf": services.write_nncf_file}[file_format]
        write(checkpoint, spec, out)
        made = {"path": str(out)}
    else:
        ir = services.convert_checkpoint(
            checkpoint, spec, ConvertSpec(), out, ranks=given, zero_points=zero_points, keep=keep, product=file_format
        )
        made = _told(ir) if file_format == "openvino" else {"path": str(ir.path)}
    if as_json:
        print_json(json.dumps(made))
    elif not quiet:
        _say(made)


def _told(ir: "IR") -> dict[str, Any]:
    """What is printed of an IR."""
    beside = str(ir.adapter_tensors) if ir.adapter else None
    return {"ir": str(ir.path), "weight_bytes": ir.weight_bytes, "adapter": beside}


def _say(made: Mapping[str, Any]) -> None:
    if "ir" not in made:
        say(f"{made['path']}: written")
        return
    say(f"{made['ir']}: {made['weight_bytes'] / 1e6:.2f} MB of weights")
    if made["adapter"]:
        say(f"{made['adapter']}: for openvino_genai.Adapter, with alpha = 1")


def _require_unused(file_format: str, given: Mapping[str, object]) -> None:
    from ovexport.errors import RecipeError

    for option, value in given.items():
        if value is not None:
            raise RecipeError(f"{option}: goes with --format openvino or onnx, not {file_format}; leave it out")
