"""`ovexport runtime`: the settings that `bench --search` wrote into an IR."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ovexport.cli.output import Json, Quiet, print_json, print_table, reports_errors, say, set_up_logging

if TYPE_CHECKING:
    from ovexport.reports import Ratio, SettingsReport


@reports_errors
def runtime(
    ir: Annotated[Path, typer.Argument(help="Folder of the IR.")],
    undo: Annotated[bool, typer.Option("--undo", help="Take them out again, byte for byte.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the runtime settings that `bench --search` found for an IR and wrote into it, or undo them.

    Example: ovexport runtime runs/demo/int4 --undo
    """
    from ovexport.artifacts import IR
    from ovexport.errors import ArtifactError
    from ovexport.openvino.runtime_settings import is_written, settings_report, undo_settings

    set_up_logging(quiet=quiet or as_json)
    model = IR(ir).require()
    if undo:
        undo_settings(model)
        if not quiet:
            say(f"{ir}: as it was converted", err=as_json)
        return
    report = settings_report(model)
    if report is None:
        raise ArtifactError(f"{ir}: no settings were searched for; ovexport bench {ir} --search does")
    if as_json:
        print_json(report.model_dump_json())
    elif not quiet:
        show_settings(report)
        if report.written and not is_written(model, report.written):
            say("but the file does not carry them now; search again, or --undo")


def show_settings(report: "SettingsReport") -> None:
    """What was tried, what was chosen, and what the IR carries of it."""
    from ovexport.numbers import written

    rows = [
        (
            _text(trial.settings),
            _ratio(trial.time_per_output_token),
            _ratio(trial.time_to_first_token),
            "–" if trial.kl_mean_nats is None else written(trial.kl_mean_nats, ".6f"),
            "kept" if trial.kept else str(trial.reason),
        )
        for trial in report.trials
    ]
    header = ("settings", "time per output token over the defaults'", "time to first token", "KL, nats", "")
    print_table(header, rows)
    if not report.chosen:
        say("nothing is faster than the runtime's defaults: nothing was written")
        return
    say(f"best: {_text(report.chosen)}: {_ratio(report.gain)} of the defaults' time per output token")
    if report.written is None:
        say("the IR can't carry it in a way that is as good: nothing was written")
    else:
        carried = report.written.options | (
            {"MatMul": report.written.matmul_precision} if report.written.matmul_precision else {}
        )
        say(
            f'written into the IR: {_text(carried)}: a plain LLMPipeline(folder, "CPU") takes '
            f"{_ratio(report.written_gain)} of the time; ovexport runtime FOLDER --undo takes it out"
        )
    if report.not_written:
        given = ", ".join(f"{name}={value!r}" for name, value in report.not_written.items())
        say(f"an IR can't carry the rest; give it to LLMPipeline: {given}")


def _text(settings: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _ratio(ratio: "Ratio | None") -> str:
    from ovexport.numbers import with_interval

    return "–" if ratio is None else with_interval(ratio.median, ratio.ci95, ".3f")
