"""What a terminal's encoding lacks is escaped; a finished command never ends with an encoding error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PRINT = """
import json, logging
from ovexport.cli.output import prepare_streams, print_json, print_table, say, set_up_logging

prepare_streams()
set_up_logging(quiet=False)
print_table(("figure − 1", "INT4 ± 1"), [("KL ‖ BF16", "−1.0 (0.5–2.0)"), ("\\u732b", "\\udcff")], title="a × b")
logging.getLogger("ovexport").warning("− ‖ \\u732b \\udcff")
say("− \\u732b \\udcff", err=True)
print_json(json.dumps({"a": "− \\u732b \\U0001d11e é"}, ensure_ascii=False))
"""


def run(encoding: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "cp1252"])
def test_tables_logs_and_json_are_shown_in_the_terminals_encoding(encoding: str) -> None:
    done = run(encoding, "-c", PRINT)
    assert (done.returncode, b"Traceback" in done.stderr) == (0, False)
    *table, document = done.stdout.decode(encoding).splitlines()
    assert json.loads(document) == {"a": "− \u732b \U0001d11e é"}
    assert "| KL || BF16 | -1.0 (0.5-2.0) |" in table
    assert "| \\u732b     |         \\udcff |" in table
    assert len({len(line) for line in table}) == 1
    assert done.stderr.decode(encoding).splitlines() == ["\\u2212 \\u2016 \\u732b \\udcff", "- \\u732b \\udcff"]


def test_a_terminal_that_knows_every_sign_shows_them() -> None:
    lines = run("utf-8", "-c", PRINT).stdout.decode().splitlines()
    assert "│ KL ‖ BF16  │ −1.0 (0.5–2.0) │" in lines
    assert "│ 猫         │         \\udcff │" in lines


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_command_names_a_file_that_the_terminal_cannot_show(tmp_path: Path, encoding: str) -> None:
    done = run(encoding, "-m", "ovexport", "verify", str(tmp_path / "a−\udcff"))
    assert done.returncode == 4
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"\n") == 1
    assert b"missing; give a folder with an OpenVINO IR" in done.stderr
