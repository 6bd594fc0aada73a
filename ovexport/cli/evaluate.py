"""`ovexport evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from ovexport.cli.output import Json, Quiet, print_table, progress, reports_errors, set_up_logging


@reports_errors
def evaluate(
    candidate: Annotated[Path, typer.Argument(help="Folder of the IR to judge.")],
    reference: Annotated[Path, typer.Option(help="Folder of the IR to compare with, such as the BF16 one.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Held-out text: .txt, .jsonl, .csv, .parquet.  [default: the run's own test text]"),
    ] = None,
    column: Annotated[str, typer.Option(help="The column that holds the text.")] = "text",
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.", min=8)] = 256,
    sequences: Annotated[int, typer.Option(help="How many sequences.", min=2)] = 64,
    encoder: Annotated[str, typer.Option(help='Sentence encoder: a name, a folder, or "offline".')] = (
        "sentence-transformers/all-mpnet-base-v2"
    ),
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="A downstream task: a name or a TOML file. May be repeated.", show_default=False),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt per line.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answers.", min=1)] = 128,
    out: Annotated[Path, typer.Option(help="Folder for evaluation.json and WhoWhatBench's csv files.")] = Path(
        "evaluation"
    ),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Similarity, divergence, perplexity and downstream tasks of an IR against a reference.

    Example: ovexport evaluate runs/demo/int4 --reference runs/demo/bf16 --encoder offline --tasks my_task.toml
    """
    from tempfile import TemporaryDirectory

    from ovexport import pipeline
    from ovexport import recipe as recipes
    from ovexport.artifacts import IR, RunFolder
    from ovexport.errors import ArtifactError, RecipeError
    from ovexport.report.table import Findings, comparison

    set_up_logging(quiet=quiet or as_json)
    given = {"encoder": encoder, "prompts": str(prompts) if prompts else None, "max_new_tokens": max_new_tokens}
    spec = recipes.section(recipes.EvaluateSpec, **given)
    asked = [recipes.load_task(name) for name in tasks or ()]
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out}: a file; choose another --out")
    models = (IR(candidate).require(), IR(reference).require())
    with TemporaryDirectory() as temporary, progress(quiet=quiet or as_json) as listener:
        if data is not None:
            source = recipes.section(recipes.SourceSpec, path=str(data), column=column)
            lengths = {"sequence_length": sequence_length, "test_sequences": sequences}
            text = recipes.section(recipes.DataSpec, **lengths)
            prepared = pipeline.prepare_test(models[1], source, text, Path(temporary) / "data")
        else:
            prepared = RunFolder(reference.absolute().parent).data
            if not prepared.path.is_dir():
                raise RecipeError(f"{reference}: not in a run's folder, which would hold the test text; give --data")
        report = pipeline.evaluate_candidate(*models, prepared, spec, out, listener, tasks=asked)
    if as_json:
        typer.echo(report.model_dump_json())
    elif not quiet:
        names, rows = comparison(Findings(None, report, None))
        print_table(("", *names), [(row.figure, *row.values) for row in rows])
        typer.echo(f"written: {out / 'evaluation.json'}")
