import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY


def test_the_readmes_tables_are_the_committed_results() -> None:
    command = [sys.executable, REPOSITORY / "benchmarks" / "tables.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_names_a_test_command_that_ci_finds() -> None:
    text = (REPOSITORY / "README.md").read_text()
    block = text.partition("<!-- test command -->")[2].partition("```bash\n")[2].partition("```")[0]
    assert block.startswith("pip install -e")
    assert block.strip().endswith("pytest")


@pytest.mark.slow
def test_a_tenth_of_the_random_damages_is_found_and_named() -> None:
    command = [sys.executable, REPOSITORY / "benchmarks" / "reliability.py", "--quick", "--json", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])["counts"]
    assert sum(count["trials"] for count in counts.values()) == 220
    for kind, count in counts.items():
        assert count["found"] == count["named"] == count["trials"], kind
