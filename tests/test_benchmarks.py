import subprocess
import sys

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
