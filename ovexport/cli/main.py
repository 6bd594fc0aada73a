"""The `ovexport` command."""

import io
import sys

import click
import typer

from ovexport import __version__
from ovexport.cli.bench import bench
from ovexport.cli.convert import convert
from ovexport.cli.doctor import doctor
from ovexport.cli.evaluate import evaluate
from ovexport.cli.gates import gates
from ovexport.cli.output import prepare_streams, print_block, say
from ovexport.cli.plan import plan
from ovexport.cli.report import report
from ovexport.cli.run import compress, run, tune
from ovexport.cli.runtime import runtime
from ovexport.cli.search import search
from ovexport.cli.verify import verify

app = typer.Typer(
    name="ovexport",
    help="A PyTorch causal language model to an INT4 OpenVINO IR that is proven to be what was tuned.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    suggest_commands=False,  # click does, and a suggestion would stand there twice
)


def _version(asked: bool) -> None:
    if asked:
        say(f"ovexport {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    """Exit codes: 0 fine, 1 a defect of ours, 2 usage or recipe, 3 missing dependency, 4 artifact missing or corrupt,
    5 model or data unsupported, or out of memory, 6 training diverged, 7 verification failed, 8 a gate failed,
    130 interrupted."""


for command in (run, plan, compress, tune, search, convert, verify, evaluate, bench, runtime, report, gates, doctor):
    app.command()(command)


def main() -> None:
    """Entry point of the console script."""
    prepare_streams()
    try:
        sys.exit(app(standalone_mode=False))
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(file=shown)
        print_block(shown.getvalue(), err=True)
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
