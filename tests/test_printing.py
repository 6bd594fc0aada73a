"""What is printed: nothing of a name is obeyed by the terminal, by rich or by a reader of Markdown."""

import ast
import json
import logging
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from conftest import REPOSITORY

from ovexport.artifacts import RunFolder
from ovexport.cli import output
from ovexport.cli.output import print_block, print_json, print_table, progress, reports_errors, say, set_up_logging
from ovexport.errors import ArtifactError
from ovexport.gates.judging import write_junit
from ovexport.progress import Progress
from ovexport.report.compare import write_comparison
from ovexport.report.page import write_report
from ovexport.reports import GateReport, GateResult
from ovexport.wording import byte_size, inert_markdown, printable

PAINTED = "in[red]t4\x1b[2J\x1b[32mPROVEN\x9b31m\u202e\n\r\u2028\x07"
SHOWN = r"in[red]t4\x1b[2J\x1b[32mPROVEN\x9b31m\u202e\n\r\u2028\x07"


def test_what_a_terminal_obeys_is_written_out() -> None:
    assert printable(PAINTED) == SHOWN
    assert printable("Größe ≤ 4 → 日本語 😀") == "Größe ≤ 4 → 日本語 😀"
    assert printable("\udcff") == r"\udcff"


def test_lines_errors_and_logs_show_a_name_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise ArtifactError(f"{PAINTED}: missing")

    say(PAINTED)
    set_up_logging(quiet=False)
    logging.getLogger("ovexport.test").info("%s", PAINTED)
    library = logging.getLogger("some_library")
    library.addHandler(handler := logging.StreamHandler(sys.stderr))
    library.error("%s", PAINTED)
    library.removeHandler(handler)
    with pytest.raises(typer.Exit) as caught:
        reports_errors(fails)()
    assert caught.value.exit_code == 4
    print_block(f"a\n{PAINTED.replace(chr(10), '')}\n")
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == SHOWN
    assert captured.err.splitlines() == [SHOWN, SHOWN, f"error: {SHOWN}: missing"]
    assert "\x1b" not in captured.out


def test_tables_and_progress_show_a_name_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_table((PAINTED, "[b]"), [(PAINTED, "[/b]")], title=PAINTED)
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 3
    assert "[b]" in out
    assert "[/b]" in out
    with progress(quiet=False) as listener:
        listener(Progress(task=PAINTED, done=1, total=1, figures={}))
    assert SHOWN in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress(quiet=False) as listener:
        listener(Progress(task="[/red]a\x9b", done=1, total=1, figures={}))
    assert "[/red]" in capsys.readouterr().err


def test_a_json_document_keeps_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(json.dumps({"name": PAINTED}, ensure_ascii=False))
    out = capsys.readouterr().out
    assert json.loads(out) == {"name": PAINTED}
    assert not {"\x9b", "\x1b", "\u202e"} & set(out)


def test_nothing_is_printed_past_the_one_place() -> None:
    printing = {"typer.echo", "typer.secho", "click.echo", "print", "rich.print"}
    for path in (REPOSITORY / "ovexport").rglob("*.py"):
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        assert path == Path(output.__file__) or not calls & printing, path


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1520, "1.52 kB"),
        (999_600, "1 MB"),
        (344e8, "34.4 GB"),
        (2e18, "2000 PB"),
    ],
)
def test_a_size_has_the_unit_that_fits(size: float, text: str) -> None:
    assert byte_size(size) == text


def test_a_name_adds_no_markdown() -> None:
    assert inert_markdown("<script>x</script>\n# Title") == r"&lt;script>x&lt;/script>\n# Title"
    assert "](" not in inert_markdown("![x](https://elsewhere)")
    assert inert_markdown("kl_mean_nats<0.1") == "kl_mean_nats<0.1"


def test_runs_with_odd_names_are_compared(finished_run: RunFolder, tmp_path: Path) -> None:
    names = ("a$\\frac{$", "<b>\x1b[31m\n")
    folders = [RunFolder(shutil.copytree(finished_run.path, tmp_path / name)) for name in names]
    page = write_comparison(folders, tmp_path / "compare.html").read_text()
    assert "<b>\x1b" not in page
    for folder in folders:
        assert "report.html" in str(write_report(folder))
    named = {"gate": "similarity\x1b>=0.9", "metric": "similarity\x1b", "operator": ">=", "limit": 0.9}
    gate = GateResult(**named, value=0.5, margin=-0.4, passed=False)
    write_junit(GateReport(passed=False, gates=(gate,)), "run", tmp_path / "junit.xml")
    ElementTree.parse(tmp_path / "junit.xml")
