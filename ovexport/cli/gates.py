"""The options `--gate` and `--junit`, and what every reporting command does with them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ovexport.gates import AnyReport
    from ovexport.recipe import Gate
    from ovexport.reports import GateReport

from ovexport.cli.output import print_json, print_table

Gates = Annotated[
    list[str] | None,
    typer.Option(
        "--gate",
        metavar="CONDITION",
        help='A limit that a figure has to keep, such as "similarity>=0.9"; exit 8 if it does not. May be repeated.',
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
    from ovexport.gates import check, figures
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
    """Hold the figures against the gates, show them, write the JUnit file, and raise when one fails.

    Args:
        gates: from read_gates.
        reports: by "verification", "evaluation" and "benchmark", those that the command made.
        command: its name: the class of the JUnit test cases.
        document: what the command prints with --json; printed here, with the key `gates` where there are any.
        quiet: show nothing.

    Raises:
        GateFailed: naming every gate that failed.
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
    from ovexport.gates import figures
    from ovexport.gates import judge as hold

    return hold(gates, figures(reports)) if gates else None


def conclude(
    verdict: "GateReport | None",
    *,
    command: str,
    junit: Path | None = None,
    document: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> None:
    """Write the JUnit file, then print the gates: in the document where there is one, as a table otherwise."""
    from ovexport.gates import write_junit

    if verdict and junit:
        write_junit(verdict, command, junit)
    if document is not None:
        print_json(json.dumps({**document, **({"gates": verdict.model_dump(mode="json")} if verdict else {})}))
    elif verdict and not quiet:
        show_gates(verdict)


def show_gates(verdict: "GateReport") -> None:
    """A table with a row per gate: its value, limit and margin."""
    from ovexport.gates import number

    def text(value: float | None) -> str:
        return "–" if value is None else number(value)

    rows = [
        (
            gate.metric,
            text(gate.value),
            f"{gate.operator} {number(gate.limit)}",
            text(gate.margin),
            "passed" if gate.passed else f"FAILED{f': {gate.reason}' if gate.reason else ''}",
        )
        for gate in verdict.gates
    ]
    print_table(("gate", "value", "limit", "margin", "verdict"), rows)


def require_gates(verdict: "GateReport | None") -> None:
    """Raise when a gate failed.

    Raises:
        GateFailed: naming every gate that failed.
    """
    from ovexport.gates import require_passed

    if verdict:
        require_passed(verdict)
