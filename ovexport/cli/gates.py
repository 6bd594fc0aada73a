"""The options `--gate` and `--junit` with what every reporting command does with them, and `ovexport gates`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ovexport.gates.figures import AnyReport, Figure
    from ovexport.recipe import Gate
    from ovexport.reports import GateReport

from ovexport.cli.output import Json, Quiet, print_json, print_table, reports_errors, say, set_up_logging

Gates = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        metavar="CONDITION",
        help='A limit that a figure has to keep, such as "similarity>=0.9"; exit 8 if it does not, or if too little '
        "was measured to tell. May be repeated; `ovexport gates` lists the figures.",
        show_default=False,
    ),
]
JUnit = Annotated[
    Path | None,
    typer.Option("--junit", metavar="FILE", help="Write the gates as JUnit XML, for a CI system.", show_default=False),
]


def read_gates(
    texts: Sequence[str] | None,
    junit: Path | None,
    kinds: Sequence[str],
    *,
    models: Sequence[str] = (),
    tasks: Sequence[str] = (),
) -> "tuple[Gate, ...]":
    """The gates that a command is given, checked before its work begins.

    Args:
        kinds: of the reports that the command makes: "verification", "evaluation", "benchmark".
        models: the names that the models will have in them, in their order; `tasks` likewise.

    Raises:
        RecipeError: a condition can't be read or is on a figure that the command does not measure, or `junit` is of no
            use.
    """
    from ovexport.gates.figures import figures
    from ovexport.gates.judging import check
    from ovexport.recipe import list_gates, parse_gates

    gates = list_gates(parse_gates(texts or ()))
    check_junit(junit, gated=bool(gates))
    check(gates, figures(dict.fromkeys(kinds), models=models, tasks=tasks))
    return gates


def check_junit(junit: Path | None, *, gated: bool) -> None:
    """Refuse a JUnit file that there is nothing to write to, or that can't be one.

    Raises:
        RecipeError: there are no gates, or the path is a folder.
    """
    from ovexport.errors import RecipeError

    if junit is not None and not gated:
        raise RecipeError(f"--junit {junit}: no gate to write there; add --gate, or leave it out")
    if junit is not None and junit.is_dir():
        raise RecipeError(f"--junit {junit}: a folder; give a file's name")


def judge(
    gates: "Sequence[Gate]",
    reports: "Mapping[str, AnyReport]",
    *,
    command: str,
    junit: Path | None = None,
    document: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> None:
    """Hold the figures against the gates, show them, write the JUnit file, and raise when one has not passed.

    Args:
        gates: from read_gates.
        reports: by "verification", "evaluation" and "benchmark", those that the command made.
        command: its name: the class of the JUnit test cases.
        document: what the command prints with --json; printed here, with the key `gates` where there are any.
        quiet: show nothing.

    Raises:
        GateFailed: naming every gate that has not passed.
        RecipeError: a gate is on a figure that is not known.
    """
    verdict = judged(gates, reports)
    conclude(verdict, command=command, junit=junit, document=document, quiet=quiet)
    require_gates(verdict)


def judged(gates: "Sequence[Gate]", reports: "Mapping[str, AnyReport]") -> "GateReport | None":
    """The verdict on the gates; None where there are none.

    Raises:
        RecipeError: a gate is on a figure that is not known.
    """
    from ovexport.gates import judging
    from ovexport.gates.figures import figures

    return judging.judge(gates, figures(reports)) if gates else None


def conclude(
    verdict: "GateReport | None",
    *,
    command: str,
    junit: Path | None = None,
    document: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> None:
    """Write the JUnit file, then print the gates: in the document where there is one, as a table otherwise."""
    from ovexport.gates.judging import write_junit

    if verdict and junit:
        write_junit(verdict, command, junit)
    if document is not None:
        print_json(json.dumps({**document, **({"gates": verdict.model_dump(mode="json")} if verdict else {})}))
    elif verdict and not quiet:
        show_gates(verdict)


def show_gates(verdict: "GateReport") -> None:
    """A table with a row per gate: its value with its 95 % interval, limit and margin."""
    from ovexport.numbers import number, number_with_interval

    rows = [
        (
            gate.metric,
            "–" if gate.value is None else number_with_interval(gate.value, gate.ci95),
            f"{gate.operator} {number(gate.limit)}",
            "–" if gate.margin is None else number(gate.margin),
            gate.status if gate.passed else f"{gate.status.upper()}{f': {gate.reason}' if gate.reason else ''}",
        )
        for gate in verdict.gates
    ]
    print_table(("gate", "value (95 % interval)", "limit", "margin", "verdict"), rows)


def require_gates(verdict: "GateReport | None") -> None:
    """Raise when a gate failed or is undecided.

    Raises:
        GateFailed: naming every gate that has not passed.
    """
    from ovexport.gates.judging import require_passed

    if verdict:
        require_passed(verdict)


@reports_errors
def gates(
    run: Annotated[
        Path | None, typer.Argument(help="A run's folder: its figures with their values.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Every name that a gate can be set on, with its unit, which way is better and what it means.

    Example: ovexport gates

    Example: ovexport gates runs/demo
    """
    from ovexport import recipe as recipes
    from ovexport.artifacts import MODELS, RunFolder
    from ovexport.errors import ArtifactError
    from ovexport.gates.figures import KINDS, figures, listed, run_figures

    set_up_logging(quiet=quiet or as_json)
    if run is None:
        known = listed(figures(dict.fromkeys(KINDS), models=MODELS, tasks=("TASK",)), of_product_alone=True)
    else:
        folder = RunFolder(run)
        if not folder.recipe.is_file():
            raise ArtifactError(f"{run}: no run, it has no recipe.toml; give the folder that ovexport run wrote")
        known = listed(run_figures(folder, recipes.load(folder.recipe)))
    if as_json:
        print_json(json.dumps({"figures": [_described(name, figure) for name, figure in known.items()]}))
    elif not quiet:
        _show_figures(known, valued=run is not None)


def _described(name: str, figure: "Figure") -> dict[str, Any]:
    """A figure in the document."""
    from ovexport.gates.figures import unit_of

    return {
        "name": name,
        "file": figure.file,
        "unit": unit_of(name) or None,
        "better": figure.meaning.better if figure.meaning else None,
        "meaning": figure.meaning.text if figure.meaning else None,
        "value": figure.value,
        "ci95": figure.ci95,
        "interval_over": figure.over,
        "reason": figure.reason if figure.value is None else None,
    }


def _show_figures(known: "Mapping[str, Figure]", *, valued: bool) -> None:
    """A table for each report's file."""
    from ovexport.gates.figures import unit_of
    from ovexport.numbers import number_with_interval

    def value_of(figure: "Figure") -> str:
        return "–" if figure.value is None else number_with_interval(figure.value, figure.ci95)

    for file in dict.fromkeys(figure.file for figure in known.values()):
        rows = []
        for name, figure in known.items():
            if figure.file == file and figure.meaning:
                shown = f"{name}…" if name.endswith(".") else name
                values = (value_of(figure),) if valued else ()
                rows.append((shown, *values, unit_of(name), figure.meaning.better or "", figure.meaning.text))
        header = ("figure", *(("value (95 % interval)",) if valued else ()), "unit", "better", "meaning")
        print_table(header, rows, title=file, numbers=1 if valued else 0)
    say(
        "Without a model's name a figure is the product's; plain.NAME is the untuned twin's, bf16.NAME the "
        "uncompressed model's. int4/bf16.NAME is a ratio, int4-plain.NAME a difference. NAME.low and NAME.high are the "
        "ends of a 95 % interval; NAME.value is judged without it."
    )
