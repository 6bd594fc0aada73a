"""Where a committed result comes from, and whether its script or its recipe has changed since.

A result holds the git revision it was measured at, its settings, and a digest of each source that it depends on: the
benchmark, the modules of this folder that the benchmark imports, and the recipe. A Python source is compared
without docstrings and comments, a recipe by its values, so that other words make no result stale. Where a source
changed in form only, say by a renamed import, `--accept` takes its present digest and says so under the table:

    python benchmarks/provenance.py --accept benchmarks/results/verify.json
"""

import argparse
import ast
import hashlib
import io
import json
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
BENCHMARKS = REPOSITORY / "benchmarks"
SHOWN_ONLY = {"command", "provenance", "tables"}
"""Modules that show or save a result and measure nothing."""
ACCEPTED = "Its script has changed since in form, not in what it measures."


def provenance(script: Path, recipe: Path | None = None, *, quick: bool = False) -> dict[str, Any]:
    """What a result says of its origin.

    Args:
        script: the benchmark.
        recipe: that it carried out; one from outside the repository is not looked at later.
        quick: whether it is a short measurement, which no table may show.
    """
    sources = [*modules_of(script), *([recipe] if recipe else [])]
    return {
        "revision": revision(),
        "quick": quick,
        "settings": [_without_folder(argument) for argument in sys.argv[1:]],
        "sources": {
            _name(source): source_digest(source) for source in sources if REPOSITORY in source.resolve().parents
        },
    }


def _without_folder(argument: str) -> str:
    """An argument of the command line; of a path its last part, as folders are a machine's own."""
    name, equals, value = argument.rpartition("=")
    return f"{name}{equals}{Path(value).name}" if "/" in value else argument


def stale_sources(document: dict[str, Any]) -> list[str]:
    """What speaks against showing a result: sources that changed since it was measured, or that it was a quick one."""
    found = document.get("provenance")
    if found is None:
        return ["it does not say what it was measured with"]
    reasons = ["it was measured with --quick"] if found["quick"] else []
    for name, digest in found["sources"].items():
        source = REPOSITORY / name
        if not source.is_file():
            reasons.append(f"{name} is gone")
        elif source_digest(source) != digest:
            reasons.append(f"{name} has changed")
    return reasons


def revision() -> str:
    """The git revision of this checkout, marked where tracked files other than results are changed."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "not in a git checkout"


def modules_of(script: Path) -> list[Path]:
    """A script of this folder and the modules of this folder that it imports, directly or not, anywhere in the code."""
    found = {script.resolve()}
    waiting = [script.resolve()]
    while waiting:
        for module in _imported(waiting.pop()):
            path = BENCHMARKS / f"{module}.py"
            if module not in SHOWN_ONLY and path.is_file() and path not in found:
                found.add(path)
                waiting.append(path)
    return sorted(found)


def _imported(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def source_digest(source: Path) -> str:
    """The first 16 digits of the SHA-256 of what a source does."""
    text = source.read_text(encoding="utf-8")
    meaning = json.dumps(tomllib.loads(text), sort_keys=True) if source.suffix == ".toml" else _code(text)
    return hashlib.sha256(meaning.encode()).hexdigest()[:16]


def _code(text: str) -> str:
    """The lines of code, without docstrings, comments and blank lines; the same in every version of Python."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _name(source: Path) -> str:
    return source.resolve().relative_to(REPOSITORY).as_posix()


def accept(result: Path) -> None:
    """Take the present digests of a result's sources, whose changes somebody has read, and note it in the result."""
    document = json.loads(result.read_text(encoding="utf-8"))
    origin = document["provenance"]
    sources = {name: source_digest(REPOSITORY / name) for name in origin["sources"]}
    if sources != origin["sources"]:
        document["provenance"] = origin | {"sources": sources, "note": ACCEPTED}
        result.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Accept the sources of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accept", nargs="+", type=Path, required=True, metavar="RESULT", help="JSON files")
    for result in parser.parse_args().accept:
        accept(result)


if __name__ == "__main__":
    main()
