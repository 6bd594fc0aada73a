"""`ovexport plan`."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ovexport.cli.output import Json, Overrides, Quiet, print_json, print_table, reports_errors, say, set_up_logging
from ovexport.wording import byte_size

if TYPE_CHECKING:
    from ovexport.pipeline.plan import Plan
    from ovexport.weights.layer import LayerFormat

_BLOCK = re.compile(r"\.(\d+)\.")


@reports_errors
def plan(
    recipe: Annotated[Path | None, typer.Argument(help="The recipe, a TOML file.", show_default=False)] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Plan this model with the default compression; groups are smaller where their size does not fit."
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="With --model: a LoRA adapter of PEFT's that is merged with it.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder, to look at its disk.", show_default=False)] = None,
    overrides: Overrides = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """No work: the fate of each layer, sizes, memory, time, and every problem ahead.

    Example: ovexport plan pipelines/demo.toml
    """
    from ovexport import recipe as recipes
    from ovexport.errors import RecipeError
    from ovexport.pipeline import services

    set_up_logging(quiet=quiet or as_json)
    if (recipe is None) == (model is None):
        raise RecipeError("give either a recipe or --model")
    if adapter is not None and model is None:
        raise RecipeError("--adapter goes with --model; a recipe names its own, as model.adapter")
    if recipe is not None:
        planned = services.plan(recipes.load(recipe, overrides or ()), out or Path("runs") / recipe.stem)
    else:
        from ovexport.pipeline.plan import plan_model

        planned = plan_model(
            recipes.ModelSpec(id=str(model), adapter=adapter), recipes.CompressSpec(fallback="smaller_group")
        )
    if as_json:
        print_json(planned.model_dump_json())
    elif not quiet:
        _show(planned)
    if planned.problems:
        say(f"error: {'; '.join(planned.problems)}", err=True)
        raise typer.Exit(planned.exit_code)


def _show(planned: "Plan") -> None:
    if planned.layers:
        _show_model(planned)
    for warning in planned.warnings:
        say(f"warning            {warning}")


def _show_model(planned: "Plan") -> None:
    header = ("layer", "mode", "shape", "group", "rank", "note")
    print_table(
        header, [_row(alike, unsuitable=alike[0].name in planned.unsuitable) for alike in _folded(planned.layers)]
    )
    tuned = 0 if planned.tuning_steps == 0 else planned.tuned_parameters
    if planned.packed:
        say(f"checkpoint         {planned.packed}")
    say(f"parameters         {planned.parameters:,}, tuned {tuned:,}")
    say(f"weights            {byte_size(planned.baseline_bytes)} before, {byte_size(planned.product_bytes)} in INT4")
    say(f"tuning memory      {byte_size(planned.tuning_memory_bytes)} and the activations")
    say(f"disk               {byte_size(planned.disk_bytes)}")
    if planned.compressing_seconds is not None and not planned.problems:
        say(f"compressing        at least {planned.compressing_seconds:,.0f} s here")
    if planned.tuning_steps is not None and not planned.problems:
        least = "" if planned.tuning_seconds is None else f", at least {planned.tuning_seconds:,.0f} s here"
        say(f"tuning             {planned.tuning_steps} steps{least}")


def _folded(layers: Sequence["LayerFormat"]) -> list[list["LayerFormat"]]:
    """The layers, those together that differ in the number of their block alone."""
    groups: dict[object, list[LayerFormat]] = {}
    for layer in layers:
        alike = layer.model_copy(update={"name": _BLOCK.sub(".*.", layer.name, count=1)})
        groups.setdefault(alike, []).append(layer)
    return list(groups.values())


def _row(layers: Sequence["LayerFormat"], *, unsuitable: bool) -> tuple[str, ...]:
    first = layers[0]
    name = first.name.removesuffix(".weight")
    if len(layers) > 1:
        name = f"{_BLOCK.sub(f'.{_ranges(layers)}.', name, count=1)} × {len(layers)}"
    return (
        name,
        "not possible" if unsuitable else first.mode,
        f"{first.out_features} × {first.in_features}",
        str(first.group_size) if first.encoding else "",
        str(first.rank) if first.rank else "",
        first.note or "",
    )


def _ranges(layers: Sequence["LayerFormat"]) -> str:
    """The numbers of the layers' blocks, such as "0–3,5"."""
    numbers = [int(match[1]) for layer in layers if (match := _BLOCK.search(layer.name))]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
