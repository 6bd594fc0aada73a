"""The command line as a user types it, without the seconds that a start takes.

Each command runs in a process of its own, forked from one that has imported everything and computed nothing.
"""

import multiprocessing
import os
import sys
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

_PRELOADED = ["ovexport.report", "ovexport.trace", "ovexport.pipeline.plan", "openvino_genai", "sentence_transformers"]
_WARM = multiprocessing.get_context("forkserver")
_WARM.set_forkserver_preload(_PRELOADED)


def ovexport(*arguments: str | Path) -> CompletedProcess[str]:
    """What `ovexport ARGUMENTS` writes, and its exit code."""
    words = [str(argument) for argument in arguments]
    with TemporaryDirectory() as folder:
        process = _WARM.Process(target=_run, args=(words, Path(folder), dict(os.environ), Path.cwd()))
        process.start()
        process.join()
        stdout, stderr = (_written(Path(folder) / name) for name in ("stdout", "stderr"))
    return CompletedProcess(words, process.exitcode or 0, stdout, stderr)


def refused(done: CompletedProcess[str], exit_code: int) -> str:
    """The one line of an error."""
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def _run(arguments: list[str], folder: Path, environment: dict[str, str], working_directory: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(working_directory)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115  it lives as long as the process
    sys.argv = ["ovexport", *arguments]
    from ovexport.cli import main

    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _written(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
