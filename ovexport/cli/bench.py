"""`ovexport bench`."""

from pathlib import Path
from typing import Annotated

import typer

from ovexport.cli.output import Json, Quiet, print_table, progress, reports_errors, set_up_logging


@reports_errors
def bench(
    irs: Annotated[list[Path], typer.Argument(help="Folders of the IRs.", metavar="IR...")],
    reference: Annotated[Path | None, typer.Option(help="What the others are divided by.", show_default=False)] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=1_000_000)] = 128,
    output_tokens: Annotated[int, typer.Option(min=2, max=1_000_000)] = 64,
    pairs: Annotated[int, typer.Option(min=5, help="Rounds in which every model runs once, at most.")] = 128,
    device: Annotated[str, typer.Option()] = "CPU",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Latency and memory of several IRs, interleaved under pinned conditions, with ratios pair by pair.

    Example: ovexport bench runs/demo/int4 runs/demo/plain --reference runs/demo/bf16
    """
    import numpy as np

    from ovexport import recipe as recipes
    from ovexport.artifacts import IR
    from ovexport.bench import bench as measure
    from ovexport.errors import RecipeError
    from ovexport.report.table import Findings, comparison

    set_up_logging(quiet=quiet or as_json)
    lengths = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "pairs": pairs}
    spec = recipes.section(recipes.BenchSpec, device=device, **lengths)
    folders = ([reference] if reference else []) + list(irs)
    models = {folder.name: IR(folder).require() for folder in folders}
    if len(models) < len(folders):
        raise RecipeError("two of the folders have the same name; rename one, the report tells them apart by it")
    prompt = np.random.default_rng(spec.seed).integers(3, 100, prompt_tokens).tolist()
    with progress(quiet=quiet or as_json) as listener:
        report = measure(models, spec, prompt, listener=listener)
    if as_json:
        typer.echo(report.model_dump_json())
    elif not quiet:
        names, rows = comparison(Findings(None, None, report))
        print_table(("", *names), [(row.figure, *row.values) for row in rows])
