"""`ovexport bench`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ovexport.cli.gates import Gates, JUnit, judge, read_gates
from ovexport.cli.output import (
    Json,
    Quiet,
    print_block,
    print_json,
    print_table,
    progress,
    reports_errors,
    say,
    section_of,
    set_up_logging,
)

if TYPE_CHECKING:
    from ovexport.artifacts import IR
    from ovexport.recipe import BenchSpec
    from ovexport.report.table import Findings
    from ovexport.reports import BenchmarkReport, PointBenchmark

_FORMATS = ("table", "llm-bench", "csv", "markdown")
_TEXT_SEQUENCES = 16
_TOKENS_BELOW = 100


Irs = Annotated[list[Path], typer.Argument(help="Folders of the IRs.", metavar="IR...")]
Reference = Annotated[
    Path | None, typer.Option(help="Folder of the IR whose figures the others are divided by.", show_default=False)
]
PromptTokens = Annotated[
    list[int] | None, typer.Option(help="Length of the prompt; several make a grid.  [default: 128]")
]
OutputTokens = Annotated[list[int] | None, typer.Option(help="Tokens to generate; several make a grid.  [default: 64]")]
BatchSize = Annotated[list[int] | None, typer.Option(help="Prompts at once; several make a grid.  [default: 1]")]
Backend = Annotated[
    list[str] | None,
    typer.Option("--backend", help='Attention: "SDPA" or "PA"; both make a grid.  [default: SDPA]'),
]
Pairs = Annotated[int, typer.Option(min=5, help="The most rounds; in each, every model runs once.")]
TimeLimit = Annotated[
    float,
    typer.Option("--time-limit", help="Seconds for the whole measurement; five sessions are measured in any case."),
]
Device = Annotated[str, typer.Option(help="The device's name in OpenVINO.")]
InferencePrecision = Annotated[str, typer.Option(help='"default", "f32", "bf16" or "f16".')]
KvCachePrecision = Annotated[str, typer.Option(help='Such as "u8", or "default".')]
DynamicGroupSize = Annotated[int | None, typer.Option(help="Of activations; 0 for none.", show_default=False)]
Threads = Annotated[int | None, typer.Option(help="Threads of the device.", show_default=False)]
Streams = Annotated[int | None, typer.Option(help="Streams of the device.", show_default=False)]
Search = Annotated[
    bool, typer.Option("--search", help="Find the best runtime settings for one length, and write them into the IR.")
]
KlLimit = Annotated[
    float,
    typer.Option(min=0, help="With --search: the largest divergence that the settings may cause, KL in nats."),
]
Format = Annotated[str, typer.Option("--format", help="table, llm-bench, csv or markdown; --json for ovexport's own.")]


@reports_errors
def bench(
    context: typer.Context,
    irs: Irs,
    reference: Reference = None,
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    batch_size: BatchSize = None,
    attention_backend: Backend = None,
    pairs: Pairs = 128,
    time_limit_s: TimeLimit = 120.0,
    device: Device = "CPU",
    inference_precision: InferencePrecision = "default",
    kv_cache_precision: KvCachePrecision = "default",
    dynamic_quantization_group_size: DynamicGroupSize = None,
    threads: Threads = None,
    streams: Streams = None,
    search: Search = False,
    kl_limit: KlLimit = 0.002,
    output_format: Format = "table",
    gates: Gates = None,
    junit: JUnit = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Latency and memory of several IRs, interleaved under pinned conditions, with ratios pair by pair.

    Example: ovexport bench runs/demo/int4 runs/demo/plain --reference runs/demo/bf16
    """
    from ovexport.recipe import BenchSpec

    wanted = _format(output_format, as_json=as_json)
    set_up_logging(quiet=quiet or wanted != "table")
    spec = section_of(BenchSpec, context)
    models = _models(irs, reference)
    limits = read_gates(gates, junit, ("benchmark",), models=tuple(models))
    _check_one_model(models, spec, wanted, search=search, gated=bool(limits))
    if search:
        _search(next(iter(models.values())), spec, kl_limit, as_json=wanted == "json", quiet=quiet)
        return
    report = _measure(models, spec, wanted, quiet=quiet)
    document = report.model_dump(mode="json") if wanted == "json" else None
    silent = quiet or wanted not in ("table", "json")
    judge(limits, {"benchmark": report}, command="bench", junit=junit, document=document, quiet=silent)


def _format(name: str, *, as_json: bool) -> str:
    """The format to write: a name of _FORMATS, or "json".

    Raises:
        RecipeError: there is no such format, or two are asked for.
    """
    from ovexport.errors import RecipeError

    if name not in _FORMATS:
        raise RecipeError(f"--format {name}: no such format; they are {', '.join(_FORMATS)}")
    if as_json and name != "table":
        raise RecipeError(f"--json and --format {name}: two formats; give one")
    return "json" if as_json else name


def _models(irs: Sequence[Path], reference: Path | None) -> "dict[str, IR]":
    """The IRs by their folders' names, the reference first.

    Raises:
        RecipeError: two have the same name.
        ArtifactError: a folder holds no IR.
    """
    from ovexport.artifacts import IR
    from ovexport.errors import RecipeError

    folders = ([reference] if reference else []) + list(irs)
    models = {folder.absolute().name: IR(folder).require() for folder in folders}
    if len(models) < len(folders):
        raise RecipeError("two of the folders have the same name; rename one, the report tells them apart by it")
    return models


def _check_one_model(models: "dict[str, IR]", spec: "BenchSpec", wanted: str, *, search: bool, gated: bool) -> None:
    """Refuse several models or points where one is asked for.

    Raises:
        RecipeError: --search or --format llm-bench with more than it takes.
    """
    from ovexport.errors import RecipeError

    if wanted == "llm-bench" and (len(models) > 1 or len(spec.points) > 1):
        raise RecipeError("--format llm-bench: of one model at one point; give one IR, no --reference and no grid")
    if search and (len(models) > 1 or gated):
        raise RecipeError("--search: takes one IR, no --reference and no --gate")


def _prompt(spec: "BenchSpec") -> list[int]:
    """Random token ids, as many as the longest prompt has."""
    import numpy as np

    tokens: list[int] = np.random.default_rng(spec.seed).integers(3, _TOKENS_BELOW, max(spec.prompt_tokens)).tolist()
    return tokens


def _measure(models: "dict[str, IR]", spec: "BenchSpec", wanted: str, *, quiet: bool) -> "BenchmarkReport":
    """Measure, and show the report unless it is wanted as JSON."""
    from ovexport.bench import bench as measure

    with progress(quiet=quiet or wanted != "table") as listener:
        report = measure(models, spec, _prompt(spec), listener=listener)
    if wanted != "json":
        _show(report, wanted, quiet=quiet)
    return report


def _show(report: "BenchmarkReport", wanted: str, *, quiet: bool) -> None:
    import json

    from ovexport.bench.formats import as_csv, as_llm_bench, as_markdown, course
    from ovexport.report.limits import promises
    from ovexport.report.table import Findings, comparison

    if wanted == "llm-bench":
        print_json(json.dumps(as_llm_bench(report)))
    elif wanted in ("csv", "markdown"):
        print_block(as_csv(report) if wanted == "csv" else as_markdown(report))
    elif not quiet:
        findings = Findings(None, None, report)
        names, rows = comparison(findings)
        print_table(("", *names), [(row.figure, *row.values) for row in rows])
        for line in (*promises(report), f"{course(report)}."):
            say(line)
        for point in report.grid[1:]:
            _show_point(point, findings)


def _show_point(point: "PointBenchmark", findings: "Findings") -> None:
    """One more point of the grid."""
    from ovexport.numbers import written

    at = f"{point.prompt_tokens} + {point.output_tokens} tokens, batch {point.batch_size}"
    columns = [
        (
            findings.titles[name],
            written(model.time_to_first_token_ms.median, ".2f"),
            written(model.time_per_output_token_ms.median, ".2f"),
            written(model.throughput_tokens_per_s, ".0f"),
        )
        for name, model in point.models.items()
    ]
    header = ("", "time to first token, ms", "time per output token, ms", "tokens per second")
    print_table(header, columns, title=f"{at}, {point.attention_backend}")


def _search(ir: "IR", spec: "BenchSpec", kl_limit: float, *, as_json: bool, quiet: bool) -> None:
    """Search, write, and show what was found."""
    import numpy as np

    from ovexport.artifacts import RunFolder
    from ovexport.bench import search_settings
    from ovexport.bench.text import packaged_text
    from ovexport.cli.runtime import show_settings
    from ovexport.errors import RecipeError
    from ovexport.openvino.runtime_settings import write_settings

    if spec.device != "CPU":
        raise RecipeError(f"--search --device {spec.device}: settings are searched for the CPU only")
    beside = RunFolder(ir.path.absolute().parent).data
    tokens = beside.tokens("test").astype(np.int64) if beside.exists else packaged_text(ir, _TEXT_SEQUENCES)
    with progress(quiet=quiet or as_json) as listener:
        report = search_settings(
            ir, spec, _prompt(spec), tokens[:_TEXT_SEQUENCES], kl_limit_nats=kl_limit, listener=listener
        )
    write_settings(ir, report)
    if as_json:
        print_json(report.model_dump_json())
    elif not quiet:
        show_settings(report)
