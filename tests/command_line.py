"""The command line as a user types it: in this process, and in one of its own where the start is what is tested."""

import contextlib
import contextvars
import io
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any


def ovexport(*arguments: str | Path) -> CompletedProcess[str]:
    """What `ovexport ARGUMENTS` writes, and its exit code, without the seconds that a start takes.

    The environment, the working directory, the logging and the context are afterwards what they were before. What a
    library prints past Python's streams is not in the result.
    """
    words = [str(argument) for argument in arguments]
    stdout, stderr = _Stream(), _Stream()
    with _restored(), contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        sys.argv = ["ovexport", *words]
        sys.stdin = io.StringIO()
        code = contextvars.copy_context().run(_main)
    return CompletedProcess(words, code, stdout.text(), stderr.text())


def started(*arguments: str | Path, **environment: str) -> CompletedProcess[str]:
    """What `python -m ovexport ARGUMENTS` writes, and its exit code, with some more variables of the environment."""
    words = [str(argument) for argument in arguments]
    command = [sys.executable, "-m", "ovexport", *words]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def refused(done: CompletedProcess[str], exit_code: int) -> str:
    """The one line of an error."""
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def _main() -> int:
    """The exit code, as the interpreter makes it of what the command raises."""
    from ovexport.cli import main

    try:
        main()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return error.code or 0
    except Exception:
        traceback.print_exc()
        return 1
    return 0


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """What a command changes in its process and that outlives it, put back."""
    environment, folder, argv, stdin = dict(os.environ), Path.cwd(), sys.argv, sys.stdin
    factory, loggers = logging.getLogRecordFactory(), _loggers()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv, sys.stdin = argv, stdin
        logging.setLogRecordFactory(factory)
        for logger, now in _loggers().items():
            level, propagate, handlers = former = loggers.get(logger, now)
            for handler in set(now[2]) - set(former[2]):
                handler.close()
            logger.setLevel(level)
            logger.propagate = propagate
            logger.handlers[:] = handlers


def _loggers() -> dict[logging.Logger, tuple[int, bool, list[Any]]]:
    """Level, propagation and handlers of every logger."""
    known = [logging.getLogger(name) for name in ("ovexport", *logging.Logger.manager.loggerDict)]
    return {logger: (logger.level, logger.propagate, list(logger.handlers)) for logger in known}


class _Stream(io.TextIOWrapper):
    """As standard output is, but in memory."""

    def __init__(self) -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, encoding="utf-8", write_through=True)

    def text(self) -> str:
        """What was written."""
        self.flush()
        return self.bytes.getvalue().decode("utf-8")
