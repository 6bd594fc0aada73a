"""`ovexport search`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovexport.cli.output import (
    Json,
    Quiet,
    print_json,
    print_table,
    progress,
    reports_errors,
    set_up_logging,
    whole_numbers,
)

if TYPE_CHECKING:
    from ovexport.artifacts import RunFolder
    from ovexport.reports import RankScore, SearchReport

Run = Annotated[Path, typer.Argument(help="Folder of a run with FQ_LORA_NLS adapters.")]
Ranks = Annotated[
    str | None,
    typer.Option(
        help="Ask the tuned model the validation questions with these ranks: one number, or one per block or Linear, "
        'as "32 24 16".',
        show_default=False,
    ),
]

_SHOWN = 10


@reports_errors
def search(run: Run, ranks: Ranks = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """The ranks that a run's search chose and the best it tried; with --ranks, other ranks as well.

    Nothing is tuned and nothing is written. Other ranks become the product's with
    `ovexport run RECIPE --resume --set search.ranks=[32,24,16]`, which does not tune again.

    Example: ovexport search runs/qwen2.5-3b-instruct-nls --ranks 24
    """
    import json

    from ovexport.artifacts import RunFolder
    from ovexport.pipeline import services

    set_up_logging(quiet=quiet or as_json)
    folder = RunFolder(run)
    answers: dict[str, dict[str, Any]] = {}
    if ranks is not None:
        given = whole_numbers(ranks, "--ranks")
        with progress(quiet=quiet or as_json) as listener:
            answers = services.ask_with_ranks(folder, given, listener)
    report = _report(folder, needed=not answers)
    if as_json:
        document = {"search": report.model_dump(mode="json") if report else None, "validation": answers or None}
        print_json(json.dumps(document))
    elif not quiet:
        _show(report, answers)


def _report(folder: "RunFolder", *, needed: bool) -> "SearchReport | None":
    """search.json; None where the run has none and it is not needed.

    Raises:
        ArtifactError: it is missing, or corrupt.
    """
    from ovexport.errors import ArtifactError
    from ovexport.reports import SearchReport
    from ovexport.storage.records import read_record

    if folder.search.is_file():
        return read_record(folder.search, SearchReport)
    if needed:
        raise ArtifactError(
            f'{folder.search}: missing; a run searches ranks if compress.format is "fq_lora_nls" and '
            "compress.rank_space has several"
        )
    return None


def _show(report: "SearchReport | None", answers: dict[str, dict[str, Any]]) -> None:
    """The best configurations of the search, and the validation figures of those that were asked with."""
    if report:
        header = ("ranks", "from", f"NLL of {report.sample_examples}", f"NLL of all {report.validation_examples}")
        rows = [_row(row, chosen=row.ranks == report.chosen) for row in report.scores[:_SHOWN]]
        print_table(header, rows, title=f"the best of {len(report.scores)}; -log p of a token of the answers, nats")
    if answers:
        names = [name for name in next(iter(answers.values()))["figures"] if not name.endswith("_stderr")]
        print_table(
            ("ranks, on the validation questions", *names),
            [
                (f"{which}: {' '.join(map(str, one['ranks']))}", *(_figure(one["figures"], name) for name in names))
                for which, one in answers.items()
            ],
        )


def _row(score: "RankScore", *, chosen: bool) -> tuple[str, ...]:
    from ovexport.numbers import written

    whole = score.validation_nll_nats
    return (
        " ".join(map(str, score.ranks)) + (" (chosen)" if chosen else ""),
        score.source,
        written(score.sample_nll_nats, ".5f"),
        "–" if whole is None else written(whole, ".5f"),
    )


def _figure(figures: dict[str, float], name: str) -> str:
    from ovexport.numbers import number, written

    error = figures.get(f"{name}_stderr")
    return number(figures[name]) if error is None else f"{written(figures[name], '.4f')} ± {written(error, '.4f')}"
