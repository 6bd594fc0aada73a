"""`ovexport bench`."""

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
    set_up_logging,
)

if TYPE_CHECKING:
    from ovexport.artifacts import IR
    from ovexport.recipe import BenchSpec
    from ovexport.reports import BenchmarkReport

_FORMATS = ("table", "llm-bench", "csv", "markdown")
_TEXT_SEQUENCES = 16
_TOKENS_BELOW = 100


@reports_errors
def bench(
    irs: Annotated[list[Path], typer.Argument(help="Folders of the IRs.", metavar="IR...")],
    reference: Annotated[Path | None, typer.Option(help="What the others are divided by.", show_default=False)] = None,
    prompt_tokens: Annotated[
        list[int] | None, typer.Option(help="Length of the prompt; several make a grid.  [default: 128]")
    ] = None,
    output_tokens: Annotated[
        list[int] | None, typer.Option(help="Tokens to generate; several make a grid.  [default: 64]")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Prompts at once; several make a grid.  [default: 1]")
    ] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help='Attention: "SDPA" or "PA"; both make a grid.  [default: SDPA]')
    ] = None,
    pairs: Annotated[int, typer.Option(min=5, help="Rounds in which every model runs once, at most.")] = 128,
    time_limit: Annotated[
        float, typer.Option(help="Seconds that all of it should take; five sessions are measured in any case.")
    ] = 120.0,
    device: Annotated[str, typer.Option(help="As OpenVINO lists it.")] = "CPU",
    inference_precision: Annotated[str, typer.Option(help='"default", "f32", "bf16" or "f16".')] = "default",
    kv_cache_precision: Annotated[str, typer.Option(help='Such as "u8", or "default".')] = "default",
    dynamic_quantization_group_size: Annotated[
        int | None, typer.Option(help="Of activations; 0 for none.", show_default=False)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the device.", show_default=False)] = None,
    streams: Annotated[int | None, typer.Option(help="Streams of the device.", show_default=False)] = None,
    search: Annotated[
        bool,
        typer.Option("--search", help="Find the best runtime settings for one length, and write them into the IR."),
    ] = False,
    kl_limit: Annotated[
        float, typer.Option(min=0, help="Of --search: how far settings may take the model from itself, KL in nats.")
    ] = 0.002,
    output_format: Annotated[
        str, typer.Option("--format", help="table, llm-bench, csv or markdown; --json for our own.")
    ] = "table",
    gates: Gates = None,
    junit: JUnit = None,
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

    if output_format not in _FORMATS:
        raise RecipeError(f"--format {output_format}: no such format; they are {', '.join(_FORMATS)}")
    if as_json and output_format != "table":
        raise RecipeError(f"--json and --format {output_format}: two formats; give one")
    wanted = "json" if as_json else output_format
    set_up_logging(quiet=quiet or wanted != "table")
    given = {
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "batch_size": batch_size,
        "attention_backend": backend,
        "pairs": pairs,
        "time_limit_s": time_limit,
        "device": device,
        "inference_precision": inference_precision,
        "kv_cache_precision": kv_cache_precision,
        "dynamic_quantization_group_size": dynamic_quantization_group_size,
        "threads": threads,
        "streams": streams,
    }
    spec = recipes.section(recipes.BenchSpec, **{name: value for name, value in given.items() if value is not None})
    folders = ([reference] if reference else []) + list(irs)
    models = {folder.absolute().name: IR(folder).require() for folder in folders}
    if len(models) < len(folders):
        raise RecipeError("two of the folders have the same name; rename one, the report tells them apart by it")
    limits = read_gates(gates, junit, ("benchmark",), models=tuple(models))
    if wanted == "llm-bench" and (len(models) > 1 or len(spec.points) > 1):
        raise RecipeError("--format llm-bench: of one model at one point; give one IR, no --reference and no grid")
    prompt = np.random.default_rng(spec.seed).integers(3, _TOKENS_BELOW, max(spec.prompt_tokens)).tolist()
    if search:
        if len(models) > 1 or limits:
            raise RecipeError("--search: takes one IR, no --reference and no --gate")
        _search(next(iter(models.values())), spec, prompt, kl_limit, as_json=wanted == "json", quiet=quiet)
        return
    with progress(quiet=quiet or wanted != "table") as listener:
        report = measure(models, spec, prompt, listener=listener)
    document = report.model_dump(mode="json") if wanted == "json" else None
    if document is None:
        _show(report, wanted, quiet=quiet)
    silent = quiet or wanted not in ("table", "json")
    judge(limits, {"benchmark": report}, command="bench", junit=junit, document=document, quiet=silent)


def _show(report: "BenchmarkReport", wanted: str, *, quiet: bool) -> None:
    import json

    from ovexport.bench.formats import as_csv, as_llm_bench, as_markdown, course
    from ovexport.numbers import written
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
        for told in (*promises(report), f"{course(report)}."):
            say(told)
        for point in report.grid[1:]:
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


def _search(ir: "IR", spec: "BenchSpec", prompt: list[int], kl_limit: float, *, as_json: bool, quiet: bool) -> None:
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
        report = search_settings(ir, spec, prompt, tokens[:_TEXT_SEQUENCES], kl_limit_nats=kl_limit, listener=listener)
    write_settings(ir, report)
    if as_json:
        print_json(report.model_dump_json())
    elif not quiet:
        show_settings(report)
