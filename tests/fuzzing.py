"""Hostile and broken inputs from a seed, and a worker that hands each to the command line under a time limit.

A case is a command line and the files that it reads. It passes when the command ends by itself, with an exit code of
the documented ones but 1 and without a traceback. Each is made from its kind, the seed and its number alone, so that
one that fails can be made again by itself.
"""

import contextlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fuzz_models import broken_ir, broken_model
from fuzz_recipes import broken_data, broken_recipe
from fuzz_values import Material

COUNTS = {"recipe": 1000, "model": 200, "data": 200, "ir": 100}
EXIT_CODES = (0, 2, 3, 4, 5, 6, 7, 8)
TIME_LIMIT_S = 30
_MEMORY_BYTES = 12 << 30
_KINDS: dict[str, Callable[[random.Random, Material, Path], list[Any]]] = {
    "recipe": broken_recipe,
    "model": broken_model,
    "data": broken_data,
    "ir": broken_ir,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A command line, whose files lie in a folder of its own."""

    kind: str
    number: int
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a case ended: an exit code, "hang" or "crash", and what was printed."""

    end: int | str
    output: str

    @property
    def traceback(self) -> bool:
        """Whether a defect showed itself."""
        return "Traceback (most recent call last)" in self.output or self.end == 1

    @property
    def passed(self) -> bool:
        """Whether the input was done or refused as it should be."""
        return self.end in EXIT_CODES and not self.traceback


def make(kind: str, number: int, seed: int, material: Material, folder: Path) -> Case:
    """Write the files of a case into an empty folder."""
    generator = random.Random(f"{seed} {kind} {number}")
    arguments = _KINDS[kind](generator, material, folder)
    return Case(kind, number, tuple(str(argument) for argument in arguments))


class Worker:
    """A process that runs command lines of ovexport, one after the other, and is begun anew when one takes it down."""

    def __init__(self) -> None:
        self._process: Any = None
        self._end: Connection | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, arguments: tuple[str, ...], folder: Path) -> Outcome:
        """Run a command line with a folder as the working directory."""
        if self._process is None:
            self._start()
        assert self._end is not None
        self._end.send((arguments, str(folder)))
        try:
            if self._answered():
                return Outcome(*self._end.recv())
            end: int | str = "hang"
        except EOFError:
            end = "crash"
        self._stop()
        return Outcome(end, "")

    def _answered(self) -> bool:
        """Wait for the answer: as long as the process computes, but for no more than the limit, which other programs on
        the machine do not shorten; and for no more than the limit while it does nothing."""
        assert self._end is not None
        began = computed = _processor_seconds(self._process.pid)
        idle_since = time.monotonic()
        while not self._end.poll(0.5):
            now = _processor_seconds(self._process.pid)
            if now > computed:
                computed, idle_since = now, time.monotonic()
            if now - began > TIME_LIMIT_S or time.monotonic() - idle_since > TIME_LIMIT_S:
                return False
        return True

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._end, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self._end.recv()  # once everything heavy is imported

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = self._end = None


def _processor_seconds(process: int) -> float:
    """What a process has computed so far, in all of its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def serve(end: Connection) -> None:
    """The worker's side: run what arrives, and answer with its exit code and its output."""
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries write past Python
    from ovexport.cli import main

    end.send("ready")
    while True:
        arguments, folder = end.recv()
        os.chdir(folder)
        output = io.StringIO()
        sys.argv = ["ovexport", *arguments]
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code: Any = 0
            try:
                main()
            except SystemExit as error:
                code = error.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
        end.send((code, output.getvalue()[-20_000:]))


def cases(kinds: dict[str, int], seed: int, material: Material, room: Path) -> Iterator[tuple[Case, Path]]:
    """Every case of the counts with its folder, which is gone once the next one is asked for."""
    for kind, count in kinds.items():
        for number in range(count):
            folder = room / f"{kind}-{number}"
            folder.mkdir(parents=True)
            yield make(kind, number, seed, material, folder), folder
            shutil.rmtree(folder, ignore_errors=True)
