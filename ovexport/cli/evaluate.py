"""`ovexport evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ovexport.cli.gates import Gates, JUnit, judge, read_gates
from ovexport.cli.output import Json, Quiet, print_table, progress, reports_errors, say, set_up_logging

if TYPE_CHECKING:
    from ovexport.reports import EvaluationReport


@reports_errors
def evaluate(
    candidate: Annotated[Path, typer.Argument(help="Folder of the IR to judge.")],
    reference: Annotated[
        Path | None,
        typer.Option(help="Folder of the IR to compare with, such as the uncompressed model's.", show_default=False),
    ] = None,
    ground_truth: Annotated[
        Path | None,
        typer.Option(
            help="A csv of the reference's answers, WhoWhatBench's or a reference.csv of ours, in their stead.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Held-out text: .txt, .jsonl, .csv, .parquet.  [default: the run's own test text]"),
    ] = None,
    column: Annotated[str, typer.Option(help="The column of --data that holds the text.")] = "text",
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence of --data.", min=8)] = 256,
    sequences: Annotated[int, typer.Option(help="How many sequences of --data.", min=2)] = 64,
    encoder: Annotated[str, typer.Option(help='Sentence encoder: a name, a folder, or "offline".')] = (
        "sentence-transformers/all-mpnet-base-v2"
    ),
    similarity_mode: Annotated[
        str, typer.Option(help='"wwb" for WhoWhatBench\'s own figures, "strict" for those without its traps.')
    ] = "wwb",
    prompts: Annotated[
        str | None,
        typer.Option(
            help='A packaged set ("long", "short", "chinese"), a file with a prompt per line or row, or a hub data '
            "set.  [default: the first words of the test documents]",
            show_default=False,
        ),
    ] = None,
    prompts_column: Annotated[str, typer.Option(help="The column that holds the prompts.")] = "prompt",
    prompt_count: Annotated[int, typer.Option(help="How many prompts, at most.", min=1)] = 24,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answers.")] = 128,
    chat_template: Annotated[str, typer.Option(help='"auto" or "off".')] = "auto",
    isolate: Annotated[
        bool, typer.Option(help="Tell weights, KV cache, dynamic quantization and activations apart.")
    ] = False,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="A downstream task: a name or a TOML file. May be repeated.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for evaluation.json and WhoWhatBench's csv files.")] = Path(
        "evaluation"
    ),
    gates: Gates = None,
    junit: JUnit = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Similarity, divergence, perplexity and downstream tasks of an IR against a reference.

    Example: ovexport evaluate runs/demo/int4 --reference runs/demo/bf16 --encoder offline --gate "similarity>=0.9"
    """
    from tempfile import TemporaryDirectory

    from ovexport import recipe as recipes
    from ovexport.artifacts import IR, PreparedData, RunFolder
    from ovexport.errors import ArtifactError, RecipeError
    from ovexport.pipeline import services

    set_up_logging(quiet=quiet or as_json)
    spec = recipes.section(
        recipes.EvaluateSpec,
        encoder=encoder,
        similarity_mode=similarity_mode,
        prompts=prompts,
        prompts_column=prompts_column,
        prompt_count=prompt_count,
        max_new_tokens=max_new_tokens,
        chat_template=chat_template,
        isolate=isolate,
    )
    asked = [recipes.load_task(name) for name in tasks or ()]
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out}: a file; choose another --out")
    if (out / "stages").is_dir() or (out / "openvino_model.xml").is_file():
        raise ArtifactError(f"{out}: holds a run or an IR, whose files would be lost; choose another --out")
    compared = [folder.absolute().name for folder in (reference, candidate) if folder]
    names = [task.name for task in asked]
    limits = read_gates(gates, junit, ("evaluation",), models=compared, tasks=names)
    model, base = IR(candidate).require(), IR(reference).require() if reference else None

    def prepared(temporary: Path) -> PreparedData | None:
        """The test text that is given, or the run's own; None where similarity alone can be measured."""
        if data is not None:
            source = recipes.section(recipes.SourceSpec, path=str(data), column=column)
            lengths = {"sequence_length": sequence_length, "test_sequences": sequences}
            text = recipes.section(recipes.DataSpec, **lengths)
            return services.prepare_test(base or model, source, text, temporary / "data")
        beside = RunFolder((reference or candidate).absolute().parent).data
        if beside.exists:
            return beside
        if prompts is None and ground_truth is None:
            raise RecipeError(
                f"{reference or candidate}: not in a run's folder, which would hold the test text; give --data, or "
                "--prompts to measure the similarity alone"
            )
        return None

    with TemporaryDirectory() as temporary, progress(quiet=quiet or as_json) as listener:
        report = services.evaluate_candidate(
            model,
            base,
            prepared(Path(temporary)),
            spec,
            out,
            listener,
            ground_truth=ground_truth,
            tasks=asked,
        )
    if not (as_json or quiet):
        _show(report)
        say(f"written: {out / 'evaluation.json'}")
    document = report.model_dump(mode="json") if as_json else None
    judge(limits, {"evaluation": report}, command="evaluate", junit=junit, document=document, quiet=quiet)


def _show(report: "EvaluationReport") -> None:
    from ovexport.report.table import Findings, comparison

    findings = Findings(None, report, None)
    names, rows = comparison(findings)
    print_table(("", *names), [(row.figure, *row.values) for row in rows])
    for name, model in report.models.items():
        steps = [
            (step.name, _nats(step.kl_mean_nats), _nats(step.reference_kl_mean_nats), step.reason or "")
            for step in model.isolation
        ]
        if steps:
            called = findings.titles
            header = ("approximated", "KL mean, nats", f"KL of {called[report.reference]} itself, nats", "")
            print_table(header, steps, title=f"where the divergence of {called[name]} comes from")


def _nats(value: float | None) -> str:
    from ovexport.numbers import written

    return "–" if value is None else written(value, ".6f")
