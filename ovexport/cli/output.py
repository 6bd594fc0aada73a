"""What the commands share: errors as one line, progress, logging, tables and JSON.

All that is printed passes `say`, `print_json`, `print_block`, `print_table`, the progress or the logging of this file,
which write what a terminal or rich would obey as text.
"""

import codecs
import functools
import io
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ovexport.errors import RecipeError
from ovexport.foreign import translate
from ovexport.progress import Listener, Progress, silent
from ovexport.wording import in_json, printable

if TYPE_CHECKING:
    from ovexport.recipe import Spec

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; logs go to stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a key of the recipe: section.key=value. May be repeated.", show_default=False),
]
RecipePath = Annotated[Path, typer.Argument(help="The recipe, a TOML file.", show_default=False)]

logger = logging.getLogger(__name__)

_NOISY = (
    "torchao",
    "torch.utils._pytree",
    "nncf",
    "optimum",
    "transformers",
    "openvino_tokenizers",
    "datasets",
    "lm_eval",
)
_PLAIN_LINE_SECONDS = 10.0
_WIDEST = 1000
_ESCAPE = "ovexport.escape"
_IN_ASCII = str.maketrans({"−": "-", "–": "-", "—": "-", "×": "x", "±": "+-", "…": "...", "‖": "||", "→": "->"})

AnySpec = TypeVar("AnySpec", bound="Spec")
Command = TypeVar("Command", bound=Callable[..., None])


def section_of(spec_type: type[AnySpec], context: typer.Context) -> AnySpec:
    """The section that a command's options give: an option whose parameter is named as a key of the section sets it,
    and one that is not given leaves the section's default.

    Raises:
        RecipeError: with every problem at once.
    """
    from ovexport.recipe import section

    given = {key: value for key, value in context.params.items() if value not in (None, ())}  # () is no value of a list
    return section(spec_type, **{key: given[key] for key in spec_type.model_fields.keys() & given.keys()})


def prepare_streams() -> None:
    """Let standard output and error show what their encoding lacks as an escape, where Python would raise an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ESCAPE)


def _escape(error: UnicodeError) -> tuple[str, int]:
    """As JSON escapes a character, so that a document with escapes in it is the same document."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[index : index + 4]}" for index in range(0, len(units), 4)), error.end


codecs.register_error(_ESCAPE, _escape)


def _in_encoding(text: str, encoding: str) -> str:
    """The text with signs of ASCII for the signs of our tables, and escapes for what else the encoding lacks."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_IN_ASCII).encode(encoding, _ESCAPE).decode(encoding)
    return text


def reports_errors(command: Command) -> Command:
    """Show an OvexportError, or a library's error that means one, as one line with its exit code, and an interruption
    as exit 130; a bug keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            say("interrupted" + ("; --resume goes on from there" if "resume" in options else ""), err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            ours = translate(error)
            if ours is None:
                raise
            if ours is not error:
                logger.debug("where it came from", exc_info=error)
            say(f"error: {ours}", err=True)
            raise typer.Exit(ours.exit_code) from None

    return wrapped  # type: ignore[return-value]


def say(text: str, *, err: bool = False) -> None:
    """Print a line."""
    stream = sys.stderr if err else sys.stdout
    typer.echo(_in_encoding(printable(text), stream.encoding or "utf-8"), file=stream)


def print_json(document: str) -> None:
    """Print a JSON document."""
    typer.echo(in_json(document), file=sys.stdout)  # without a file, click writes UTF-8 to a terminal of ASCII


def print_block(text: str, *, err: bool = False) -> None:
    """Print a text of several lines, which ends with a line end."""
    for line in text.removesuffix("\n").split("\n"):
        say(line, err=err)


class _OneLine(logging.LogRecord):
    """A message on one line, whatever names are in it, ours or a library's."""

    def getMessage(self) -> str:  # noqa: N802  logging's name
        return printable(super().getMessage())


def set_up_logging(*, quiet: bool, file: Path | None = None) -> None:
    """Our own messages on stderr, and in the file where one is given; the libraries' errors only."""
    logging.setLogRecordFactory(_OneLine)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logger = logging.getLogger("ovexport")
    logger.setLevel(logging.DEBUG)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = False
    stderr = logging.StreamHandler(sys.stderr)
    stderr.setLevel(logging.ERROR if quiet else logging.INFO)
    stderr.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(stderr)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        log = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
        log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(log)


def whole_numbers(text: str, option: str) -> list[int]:
    """Whole numbers with commas or spaces between them.

    Raises:
        RecipeError: one is no whole number.
    """
    try:
        return [int(number) for number in re.split(r"[,\s]+", text.strip())]
    except ValueError:
        raise RecipeError(f'{option} {text!r}: not whole numbers; write "32 24 16", or 32,24,16') from None


@contextmanager
def progress(*, quiet: bool) -> Iterator[Listener]:
    """A bar with an ETA on a terminal; a plain line now and then elsewhere."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _bars() as listener:
            yield listener
    else:
        yield _plain_lines()


@contextmanager
def _bars() -> Iterator[Listener]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def listener(moment: Progress) -> None:
            if moment.task not in tasks:
                tasks[moment.task] = bars.add_task(printable(moment.task), total=moment.total, figures="")
            bars.update(tasks[moment.task], completed=moment.done, figures=_figures(moment))

        yield listener


def _plain_lines() -> Listener:
    started: dict[str, float] = {}
    shown: dict[str, float] = {}

    def listener(moment: Progress) -> None:
        now = time.monotonic()
        first = started.setdefault(moment.task, now)
        if moment.done < moment.total and now - shown.setdefault(moment.task, now) < _PLAIN_LINE_SECONDS:
            return
        shown[moment.task] = now
        left = (now - first) / max(1, moment.done - 1) * (moment.total - moment.done)
        eta = f", {left:.0f} s left" if moment.done < moment.total else ""
        say(f"  {moment.task} {moment.done}/{moment.total}{eta}  {_figures(moment)}".rstrip(), err=True)

    return listener


def _figures(moment: Progress) -> str:
    validated = [name for name in moment.figures if name.startswith("validation_")]
    shown = ("loss_nats", *validated, "tokens_per_s")
    return "  ".join(f"{name} {moment.figures[name]:.5g}" for name in shown if name in moment.figures)


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None, numbers: int | None = None
) -> None:
    """A table on stdout, as wide as it needs to be when stdout is no terminal.

    Args:
        numbers: how many columns after the first are set to the right; all of them unless given.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def cell(text: str) -> Text:
        return Text(_in_encoding(printable(text), console.encoding))

    table = Table(title=None if title is None else cell(title), title_justify="left")
    last = len(header) if numbers is None else numbers
    for number, name in enumerate(header):
        table.add_column(cell(name), justify="right" if 0 < number <= last else "left")
    for row in rows:
        table.add_row(*map(cell, row))
    if not console.is_terminal:
        console = Console(width=Console(width=_WIDEST).measure(table).maximum)
    console.print(table)
