"""`ovexport evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ovexport.cli.gates import Gates, JUnit, judge, read_gates
from ovexport.cli.output import Json, Quiet, print_table, progress, reports_errors, say, section_of, set_up_logging

if TYPE_CHECKING:
    from ovexport.artifacts import IR, PreparedData
    from ovexport.recipe import TaskSpec
    from ovexport.reports import EvaluationReport, ModelEvaluation

Candidate = Annotated[Path, typer.Argument(help="Folder of the IR to judge.")]
Reference = Annotated[
    Path | None,
    typer.Option(help="Folder of the IR to compare with, such as the baseline.", show_default=False),
]
GroundTruth = Annotated[
    Path | None,
    typer.Option(
        help="A csv with the reference's answers, used in place of generating them: WhoWhatBench's, or a reference.csv "
        "that ovexport wrote.",
        show_default=False,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="Held-out text: .txt, .jsonl, .csv, .parquet.  [default: the run's own test text]"),
]
Column = Annotated[str, typer.Option(help="The column of --data that holds the text.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens per sequence of --data.", min=8)]
Sequences = Annotated[int, typer.Option(help="How many sequences of --data.", min=2)]
Encoder = Annotated[str, typer.Option(help='Sentence encoder: a name, a folder, or "offline".')]
SimilarityMode = Annotated[
    str, typer.Option(help='"wwb" for WhoWhatBench\'s own figures, "strict" for figures without its known errors.')
]
Prompts = Annotated[
    str | None,
    typer.Option(
        help='A packaged set ("long", "short", "chinese"), a file with a prompt per line or row, or a hub data '
        "set.  [default: the first words of the test documents]",
        show_default=False,
    ),
]
PromptsColumn = Annotated[str, typer.Option(help="The column that holds the prompts.")]
PromptCount = Annotated[int, typer.Option(help="The most prompts.", min=1)]
AnswerTokens = Annotated[int, typer.Option(help="Tokens generated per answer.")]
ChatTemplate = Annotated[str, typer.Option(help='"auto" or "off".')]
Isolate = Annotated[
    bool, typer.Option(help="Split the divergence by source: weights, KV cache, dynamic quantization, activations.")
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(help="A downstream task: a name or a TOML file. May be repeated.", show_default=False),
]
Out = Annotated[Path, typer.Option(help="Folder for evaluation.json and WhoWhatBench's csv files.")]


@reports_errors
def evaluate(
    context: typer.Context,
    candidate: Candidate,
    reference: Reference = None,
    ground_truth: GroundTruth = None,
    data: Data = None,
    column: Column = "text",
    sequence_length: SequenceLength = 256,
    sequences: Sequences = 64,
    encoder: Encoder = "sentence-transformers/all-mpnet-base-v2",
    similarity_mode: SimilarityMode = "wwb",
    prompts: Prompts = None,
    prompts_column: PromptsColumn = "prompt",
    prompt_count: PromptCount = 24,
    max_new_tokens: AnswerTokens = 128,
    chat_template: ChatTemplate = "auto",
    isolate: Isolate = False,
    tasks: Tasks = None,
    out: Out = Path("evaluation"),
    gates: Gates = None,
    junit: JUnit = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Similarity, divergence, perplexity and downstream tasks of an IR against a reference.

    Example: ovexport evaluate runs/demo/int4 --reference runs/demo/bf16 --encoder offline --gate "similarity>=0.9"
    """
    from ovexport.artifacts import IR
    from ovexport.recipe import load_task

    set_up_logging(quiet=quiet or as_json)
    asked = [load_task(name) for name in tasks or ()]
    text = _Text(data, column, sequence_length, sequences, needed=prompts is None and ground_truth is None)
    _require_free(out)
    compared = [folder.absolute().name for folder in (reference, candidate) if folder]
    limits = read_gates(gates, junit, ("evaluation",), models=compared, tasks=[task.name for task in asked])
    models = IR(candidate).require(), IR(reference).require() if reference else None
    report = _measure(context, *models, text, ground_truth, asked, out, shown=not (as_json or quiet))
    document = report.model_dump(mode="json") if as_json else None
    judge(limits, {"evaluation": report}, command="evaluate", junit=junit, document=document, quiet=quiet)


@dataclass(frozen=True, slots=True)
class _Text:
    """The test text that the command line names.

    Attributes:
        path: its file; None for the text of the run that the IR lies in.
        needed: nothing can be measured without it.
    """

    path: Path | None
    column: str
    sequence_length: int
    sequences: int
    needed: bool

    def prepared(self, ir: "IR", out: Path) -> "PreparedData | None":
        """The text as sequences of tokens; None where there is none and the similarity can be measured without.

        Args:
            ir: whose tokenizer is used, and whose run is looked in.

        Raises:
            RecipeError: there is none, and it is needed.
            DataError: it can't be read, or there is too little of it.
        """
        from ovexport import recipe as recipes
        from ovexport.artifacts import RunFolder
        from ovexport.errors import RecipeError
        from ovexport.pipeline import services

        if self.path is not None:
            source = recipes.section(recipes.SourceSpec, path=str(self.path), column=self.column)
            lengths = {"sequence_length": self.sequence_length, "test_sequences": self.sequences}
            return services.prepare_test(ir, source, recipes.section(recipes.DataSpec, **lengths), out)
        beside = RunFolder(ir.path.absolute().parent).data
        if beside.exists:
            return beside
        if self.needed:
            raise RecipeError(
                f"{ir.path}: not in a run's folder, which would hold the test text; give --data, or --prompts to "
                "measure the similarity alone"
            )
        return None


def _require_free(out: Path) -> None:
    """Refuse an output folder that holds what would be lost.

    Raises:
        ArtifactError: it is a file, a run or an IR.
    """
    from ovexport.errors import ArtifactError

    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out}: a file; choose another --out")
    if (out / "stages").is_dir() or (out / "openvino_model.xml").is_file():
        raise ArtifactError(f"{out}: holds a run or an IR, whose files would be lost; choose another --out")


def _measure(
    context: typer.Context,
    candidate: "IR",
    reference: "IR | None",
    text: _Text,
    ground_truth: Path | None,
    tasks: "Sequence[TaskSpec]",
    out: Path,
    *,
    shown: bool,
) -> "EvaluationReport":
    """Evaluate, with progress and tables where they are `shown`."""
    from tempfile import TemporaryDirectory

    from ovexport.pipeline import services
    from ovexport.recipe import EvaluateSpec

    spec = section_of(EvaluateSpec, context)
    with TemporaryDirectory() as temporary, progress(quiet=not shown) as listener:
        data = text.prepared(reference or candidate, Path(temporary) / "data")
        report = services.evaluate_candidate(
            candidate, reference, data, spec, out, listener, ground_truth=ground_truth, tasks=tasks
        )
    if shown:
        _show(report)
        say(f"written: {out / 'evaluation.json'}")
    return report


def _show(report: "EvaluationReport") -> None:
    from ovexport.report.table import Findings, comparison

    names, rows = comparison(Findings(None, report, None))
    print_table(("", *names), [(row.figure, *row.values) for row in rows])
    for name, model in report.models.items():
        if model.isolation:
            _show_isolation(report, name, model)


def _show_isolation(report: "EvaluationReport", name: str, model: "ModelEvaluation") -> None:
    """Where a model's divergence comes from."""
    from ovexport.report.table import Findings

    titles = Findings(None, report, None).titles
    steps = [
        (step.name, _nats(step.kl_mean_nats), _nats(step.reference_kl_mean_nats), step.reason or "")
        for step in model.isolation
    ]
    header = ("approximated", "KL mean, nats", f"KL of {titles[report.reference]} itself, nats", "")
    print_table(header, steps, title=f"where the divergence of {titles[name]} comes from")


def _nats(value: float | None) -> str:
    from ovexport.numbers import written

    return "–" if value is None else written(value, ".6f")
