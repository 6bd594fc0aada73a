"""`ovexport plan`."""

from pathlib import Path
from typing import Annotated

import typer

from ovexport.cli.output import Json, Overrides, Quiet, print_json, print_table, reports_errors, say, set_up_logging
from ovexport.wording import byte_size


@reports_errors
def plan(
    recipe: Annotated[Path | None, typer.Argument(help="The recipe, a TOML file.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="Plan this model with the default compression.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder, to look at its disk.", show_default=False)] = None,
    overrides: Overrides = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """No work: the fate of each layer, sizes, memory, time, and every problem ahead.

    Example: ovexport plan pipelines/demo.toml
    """
    from ovexport import plan as plans
    from ovexport import recipe as recipes
    from ovexport.errors import RecipeError

    set_up_logging(quiet=quiet or as_json)
    if (recipe is None) == (model is None):
        raise RecipeError("give either a recipe or --model")
    if recipe is not None:
        found = plans.plan(recipes.load(recipe, overrides or ()), out or Path("runs") / recipe.stem)
    else:
        found = plans.plan_model(recipes.ModelSpec(id=str(model)), recipes.CompressSpec(fallback="smaller_group"))
    if as_json:
        print_json(found.model_dump_json())
    elif not quiet:
        _show(found)
    if found.problems:
        say(f"error: {'; '.join(found.problems)}", err=True)
        raise typer.Exit(found.exit_code)


def _show(found) -> None:  # type: ignore[no-untyped-def]  # the type lives in a module that imports torch
    rows = [
        (
            layer.name.removesuffix(".weight"),
            layer.mode,
            f"{layer.out_features} × {layer.in_features}",
            str(layer.group_size) if layer.mode != "float" else "",
            str(layer.rank) if layer.rank else "",
            layer.note or "",
        )
        for layer in found.layers
    ]
    print_table(("layer", "mode", "shape", "group", "rank", "note"), rows)
    say(f"parameters         {found.parameters:,}, tuned {found.tuned_parameters:,}")
    say(f"weights            {byte_size(found.baseline_bytes)} before, {byte_size(found.product_bytes)} in INT4")
    say(f"tuning memory      {byte_size(found.tuning_memory_bytes)} and the activations")
    say(f"disk               {byte_size(found.disk_bytes)}")
    if found.tuning_steps is not None and not found.problems:
        least = "" if found.tuning_seconds is None else f", at least {found.tuning_seconds:,.0f} s here"
        say(f"tuning             {found.tuning_steps} steps{least}")
