"""`ovexport search`."""

from pathlib import Path
from typing import Annotated

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

_SHOWN = 10


@reports_errors
def search(
    run: Annotated[Path, typer.Argument(help="Folder of a run with FQ_LORA_NLS adapters.")],
    ranks: Annotated[
        str | None,
        typer.Option(
            help="Ask the tuned model the validation questions with these ranks: one number, or one per block or "
            'Linear, as "32 24 16".',
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The ranks that a run's search chose and the best it tried; with --ranks, a configuration of one's own as well.

    Nothing is tuned and nothing is written. A configuration becomes the product's with
    `ovexport run RECIPE --resume --set search.ranks=[32,24,16]`, which does not tune again.

    Example: ovexport search runs/qwen2.5-3b-instruct-nls --ranks 24
    """
    import json

    from ovexport.artifacts import RunFolder
    from ovexport.errors import ArtifactError
    from ovexport.numbers import written
    from ovexport.pipeline import services
    from ovexport.reports import SearchReport
    from ovexport.storage.records import read_record

    set_up_logging(quiet=quiet or as_json)
    folder = RunFolder(run)
    given = None if ranks is None else whole_numbers(ranks, "--ranks")
    asked = {}
    if given is not None:
        with progress(quiet=quiet or as_json) as listener:
            asked = services.ask_with_ranks(folder, given, listener)
    if not folder.search.is_file() and not asked:
        raise ArtifactError(
            f'{folder.search}: missing; a run searches ranks where compress.format is "fq_lora_nls" and '
            "compress.rank_space has several"
        )
    report = read_record(folder.search, SearchReport) if folder.search.is_file() else None
    if as_json:
        document = {"search": report.model_dump(mode="json") if report else None, "validation": asked or None}
        print_json(json.dumps(document))
        return
    if quiet:
        return
    if report:
        rows = [
            (
                " ".join(map(str, row.ranks)) + (" (chosen)" if row.ranks == report.chosen else ""),
                row.source,
                written(row.sample_nll_nats, ".5f"),
                "–" if row.validation_nll_nats is None else written(row.validation_nll_nats, ".5f"),
            )
            for row in report.scores[:_SHOWN]
        ]
        header = ("ranks", "from", f"NLL of {report.sample_examples}", f"NLL of all {report.validation_examples}")
        print_table(header, rows, title=f"the best of {len(report.scores)}; -log p of a token of the answers, nats")
    if asked:
        names = [name for name in next(iter(asked.values()))["figures"] if not name.endswith("_stderr")]
        print_table(
            ("ranks, on the validation questions", *names),
            [
                (f"{which}: {' '.join(map(str, one['ranks']))}", *(_figure(one["figures"], name) for name in names))
                for which, one in asked.items()
            ],
        )


def _figure(figures: dict[str, float], name: str) -> str:
    error = figures.get(f"{name}_stderr")
    from ovexport.numbers import number, written

    return number(figures[name]) if error is None else f"{written(figures[name], '.4f')} ± {written(error, '.4f')}"
