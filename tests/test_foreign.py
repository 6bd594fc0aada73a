"""Errors of Python and of the libraries: each known one is a line of ours, and what is none stays a defect."""

import builtins
import errno
import inspect
import zipfile
from collections.abc import Iterator
from pathlib import Path

import datasets.exceptions
import filelock
import httpx
import huggingface_hub.errors
import nncf.errors
import openvino.frontend
import pyarrow.lib
import pytest
import safetensors
import torch
import yaml

from ovexport.cli.output import reports_errors
from ovexport.errors import ArtifactError, DataError, OutOfMemory, OvexportError, UnsupportedModelError
from ovexport.foreign import exhausted, translate, translated
from ovexport.storage.files import atomic_folder, translated_disk_errors

LIBRARIES = (
    datasets.exceptions, filelock, httpx, huggingface_hub.errors, nncf.errors, openvino.frontend, pyarrow.lib,
    safetensors, torch, torch.cuda, yaml, zipfile,
)  # fmt: skip
BUILT_IN = {error for error in vars(builtins).values() if isinstance(error, type)}
NOT_RAISED = {"_queue.Empty"}
"""In pyarrow's module by import alone."""


def exceptions() -> Iterator[type[Exception]]:
    """Every class of error that the libraries export."""
    for library in LIBRARIES:
        for kind in vars(library).values():
            foreign = inspect.isclass(kind) and issubclass(kind, Exception) and kind not in BUILT_IN
            if foreign and not issubclass(kind, Warning) and f"{kind.__module__}.{kind.__qualname__}" not in NOT_RAISED:
                yield kind


@pytest.mark.parametrize("kind", dict.fromkeys(exceptions()), ids=lambda kind: f"{kind.__module__}.{kind.__qualname__}")
def test_every_error_of_the_libraries_is_one_of_ours(kind: type[Exception]) -> None:
    error = type(kind.__name__, (kind,), {"__str__": lambda _: "what it says", "__init__": lambda _: None})()
    assert isinstance(translate(error), OvexportError)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Exception from src/inference/src/cpp/core.cpp:126:\nstd::bad_alloc\n"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        safetensors.SafetensorError("I/O error: Cannot allocate memory (os error 12)"),
    ],
    ids=repr,
)
def test_out_of_memory_is_one_line_with_a_cure(error: Exception) -> None:
    ours = translate(error, "stage tune")
    assert isinstance(ours, OutOfMemory)
    assert str(ours).startswith("stage tune: out of memory")
    assert "lower tune.batch_size" in str(ours)
    assert "\n" not in str(ours)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left"),
        (OSError(errno.EFBIG, "File too large"), "ulimit -f"),
        (OSError(errno.EIO, "Input/output error"), "the disk failed"),
        (safetensors.SafetensorError("I/O error: No space left on device (os error 28)"), "no space"),
        (safetensors.SafetensorError("I/O error: File too large (os error 27)"), "ulimit -f"),
        (safetensors.SafetensorError("I/O error: Input/output error (os error 5)"), "disk failed"),
        (RuntimeError("basic_ios::clear: iostream error"), "full or a limit"),
    ],
    ids=repr,
)  # fmt: skip
def test_a_disk_that_gives_out_is_one_line_whoever_says_so(error: Exception, text: str, tmp_path: Path) -> None:
    assert text in str(translate(error))
    with pytest.raises(ArtifactError, match=text), translated(), atomic_folder(tmp_path / "a"):
        raise error
    with pytest.raises(ArtifactError, match=text), translated(), translated_disk_errors(tmp_path):
        raise error


def test_a_file_that_the_system_can_not_open_is_named_with_what_it_was_for() -> None:
    error = FileNotFoundError(errno.ENOENT, "No such file or directory", "/gone")
    assert str(translate(error, "stage bench")) == "stage bench: /gone: no such file or folder; look at its name"
    assert str(translate(error)) == "/gone: no such file or folder; look at its name"


def test_what_gave_out_is_found_behind_other_errors() -> None:
    error = ValueError("An error occurred while generating the dataset")
    error.__cause__ = RuntimeError("elsewhere")
    error.__cause__.__context__ = MemoryError()
    assert isinstance(exhausted(error, "text.csv"), OutOfMemory)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        ValueError("x"),
        TypeError("x"),
        IndexError(),
        RuntimeError("x"),
        ImportError("cannot import name 'x' from 'ovexport.data.rows'", name="ovexport.data.rows"),
        ModuleNotFoundError("No module named 'ovexport.x'", name="ovexport.x"),
    ],
)
def test_a_defect_of_ours_stays_one(error: Exception) -> None:
    assert translate(error) is None
    with pytest.raises(type(error)):
        reports_errors(lambda: (_ for _ in ()).throw(error))()


def test_an_error_of_ours_stays_as_it_is() -> None:
    error = DataError("no text")
    assert translate(error, "elsewhere") is error


def test_openvino_says_last_what_matters() -> None:
    error = RuntimeError("Exception from src/core/src/node.cpp:1:\nCheck 'a' failed at x:\n\nthe shapes differ\n")
    ours = translate(error)
    assert isinstance(ours, UnsupportedModelError)
    assert "the shapes differ" in str(ours)
