"""Errors of Python and of the libraries, as errors of ours: one table.

A seam that knows what it was doing (loading a model, reading a file) asks the table first and has words of its own for
the rest; what passes every seam meets the table at the end of a stage and of the command line. An error that is in no
row is a defect of ours and keeps its traceback. The rows name types by their full names, so that no library is
imported.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ovexport.errors import ArtifactError, DataError, MissingDependencyError, OutOfMemory, OvexportError, last_line
from ovexport.errors import UnsupportedModelError as Unsupported


@dataclass(frozen=True, slots=True)
class Row:
    """What an error of a library means.

    Attributes:
        name: of its class or of one that it is derived from, in full; of a module, where it ends with a dot.
        said: pattern that its message holds; "" for every message.
        becomes: the error class of ours.
        problem: in words; `{said}` is the library's own.
        cure: what to do.
    """

    name: str
    said: str
    becomes: type[OvexportError]
    problem: str
    cure: str


_LESS_MEMORY = (
    "lower tune.batch_size or data.sequence_length, close other programs, or take a machine with more memory; of the "
    'ways to compress, compress.rounding = "nearest" takes the least'
)
_LESS_DEVICE_MEMORY = 'lower tune.batch_size or data.sequence_length, or set tune.device and compress.device to "cpu"'
_ALLOCATION = (
    r"can't allocate memory|Cannot allocate memory|not enough memory|bad_alloc|bad allocation|bad_array_new_length"
    r"|failed to allocate|Failed to allocate|os error 12\b|Storage size calculation overflowed"
)
_DEVICE_ALLOCATION = r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|XPU out of memory"
_FULL = r"No space left on device|Disk quota exceeded|os error (28|122)\b"
_TOO_LARGE = r"File too large|os error 27\b"

NO_SPACE = ("no space left on the disk", "free some, then --resume")
_TOO_LARGE_A_FILE = (
    "a file became larger than the file system or a limit (ulimit -f) allows",
    "raise the limit, or choose another --out",
)
_NOT_WRITTEN = (
    "OpenVINO could not write or read a file; the disk is full or a limit (ulimit -f) is too low",
    "free some space or raise the limit, then --resume",
)
_FAILED_DISK = ("the disk failed to read or write ({said})", "look at the disk, or copy the files to another")

_ALL_PACKAGES = (
    '"pip install ovexport" installs what is missing; verify, bench and runtime need less (ovexport doctor --target)'
)
_ON_CPU = 'set tune.device and compress.device to "cpu"'
_OTHER_MODEL = "choose another model"
_NAME_OR_FOLDER = "check the name and the network, or give a folder"
_DEVICE_FULL = "out of memory on the device ({said})"

TABLE = (
    Row("torch.OutOfMemoryError", "", OutOfMemory, _DEVICE_FULL, _LESS_DEVICE_MEMORY),
    Row("builtins.RuntimeError", _DEVICE_ALLOCATION, OutOfMemory, _DEVICE_FULL, _LESS_DEVICE_MEMORY),
    Row("builtins.MemoryError", "", OutOfMemory, "out of memory ({said})", _LESS_MEMORY),
    Row("builtins.Exception", _ALLOCATION, OutOfMemory, "out of memory ({said})", _LESS_MEMORY),
    Row("builtins.Exception", _FULL, ArtifactError, *NO_SPACE),
    Row("builtins.Exception", _TOO_LARGE, ArtifactError, *_TOO_LARGE_A_FILE),
    Row("builtins.Exception", "basic_ios::clear", ArtifactError, *_NOT_WRITTEN),
    Row("safetensors_rust.SafetensorError", "os error|I/O error", ArtifactError, *_FAILED_DISK),
    Row("safetensors_rust.SafetensorError", "", ArtifactError, "corrupt weights ({said})", "copy or make them again"),
    Row("torch.AcceleratorError", "", Unsupported, "the device failed ({said})", _ON_CPU),
    Row("torch.cuda.CudaError", "", Unsupported, "the device failed ({said})", _ON_CPU),
    Row("torch.cuda.DeferredCudaCallError", "", Unsupported, "the device failed ({said})", _ON_CPU),
    Row("torch.FatalError", "", Unsupported, "torch failed ({said})", _OTHER_MODEL),
    Row("torch.jit.", "", Unsupported, "torch can't trace it ({said})", _OTHER_MODEL),
    Row(
        "huggingface_hub.errors.StrictDataclassError", "", Unsupported, "bad configuration ({said})", "mend config.json"
    ),
    Row("huggingface_hub.errors.OfflineModeIsEnabled", "", ArtifactError, "HF_HUB_OFFLINE is set", "unset it"),
    Row("huggingface_hub.errors.", "", ArtifactError, "the Hugging Face hub: {said}", _NAME_OR_FOLDER),
    Row("httpx.", "", ArtifactError, "the network failed ({said})", "check it, or give a folder"),
    Row("datasets.table.", "", DataError, "the text can't be read ({said})", "give rows of one kind"),
    Row("datasets.exceptions.", "", DataError, "the text can't be read ({said})", "give a file in UTF-8"),
    Row("pyarrow.lib.", "", DataError, "the text can't be read ({said})", "give a sound file"),
    Row("yaml.error.YAMLError", "", ArtifactError, "no YAML ({said})", "mend the file"),
    Row("zipfile.", "", ArtifactError, "no archive, or a damaged one ({said})", "copy it again"),
    Row("xml.etree.ElementTree.ParseError", "", ArtifactError, "no XML ({said})", "make it again"),
    Row("xml.parsers.expat.ExpatError", "", ArtifactError, "no XML ({said})", "make it again"),
    Row("filelock.", "", ArtifactError, "its lock can't be had ({said})", "wait, or choose another --out"),
    Row("nncf.errors.", "", Unsupported, "NNCF can't do it ({said})", "set compress.awq = false"),
    Row("openvino._pyopenvino.", "", Unsupported, "OpenVINO can't do it ({said})", _OTHER_MODEL),
    Row(
        "builtins.RuntimeError", "Exception from src", Unsupported, "OpenVINO can't do it ({said})", "make the IR again"
    ),
    Row("builtins.ImportError", "", MissingDependencyError, "a package is missing ({said})", _ALL_PACKAGES),
)

_OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_OF_SYSTEM = {
    errno.ENOSPC: NO_SPACE,
    errno.EDQUOT: NO_SPACE,
    errno.EFBIG: _TOO_LARGE_A_FILE,
    errno.EIO: _FAILED_DISK,
    errno.ENAMETOOLONG: ("a name longer than the file system takes, which is 255 bytes", "give a shorter one"),
    errno.EMFILE: ("too many open files", "raise ulimit -n"),
    errno.ENFILE: ("too many open files", "close other programs"),
    errno.ENOENT: ("no such file or folder", "look at its name"),
    errno.EACCES: ("not allowed ({said})", "look at its permissions"),
    errno.EPERM: ("not allowed ({said})", "look at its permissions"),
    errno.EROFS: ("can't be written ({said})", "choose another --out"),
}
"""What an OSError means: problem and cure by its number."""


def translate(error: BaseException, subject: str = "") -> OvexportError | None:
    """The error as one of ours; None where it is in no row, which makes it a defect.

    Args:
        subject: what it is about, such as a file or a stage; the file that the error itself names without it.
    """
    if isinstance(error, OvexportError):
        return error
    if isinstance(error, ImportError) and (error.name or "").partition(".")[0] == "ovexport":
        return None
    return exhausted(error, subject) or _by_row(error, subject, TABLE) or _of_system(error, subject)


def exhausted(error: BaseException, subject: str = "") -> OvexportError | None:
    """The error as one of ours where memory or disk gave out, whatever library says so and however it is wrapped."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in _OF_DISK:
            return _of_system(cause, subject)
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return OutOfMemory(_line(subject, f"out of memory ({said(cause)})", _LESS_MEMORY))
        ours = _by_row(cause, subject, TABLE[:_EXHAUSTED])
        if ours is not None:
            return ours
    return None


_EXHAUSTED = next(number for number, row in enumerate(TABLE) if row.name.startswith("safetensors")) + 1
"""So many rows of the table, from its first, are of memory and disk."""


@contextmanager
def translated(subject: str = "") -> Iterator[None]:
    """Raise what the block raises as an error of ours, where it is in the table.

    Raises:
        OvexportError: with one line: the subject, what happened and the cure.
    """
    try:
        yield
    except OvexportError:
        raise
    except Exception as error:
        ours = translate(error, subject)
        if ours is None:
            raise
        raise ours from error


def said(error: BaseException) -> str:
    """What a library's error says in its first line, OpenVINO's in its last; its type where it says nothing.

    Of an error that was raised from another the other's words count: libraries wrap errors in ones that say nothing.
    """
    words = type(error).__name__
    cause: BaseException | None = error
    while cause is not None:
        words = _own_words(cause) or words
        cause = cause.__cause__
    return words


def _own_words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith(("Exception from", "Check ")):
        return last_line(error)
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else ""


def _by_row(error: BaseException, subject: str, rows: tuple[Row, ...]) -> OvexportError | None:
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        return None
    message = str(error)
    types = [f"{base.__module__}.{base.__qualname__}" for base in type(error).__mro__]
    for row in rows:
        named = any(name.startswith(row.name) if row.name.endswith(".") else name == row.name for name in types)
        if named and re.search(row.said, message):
            return row.becomes(_line(subject, row.problem.format(said=said(error)), row.cure))
    return None


def _of_system(error: BaseException, subject: str) -> OvexportError | None:
    """An OSError as one of ours; a pipe that nobody reads any more is left to the command line's library."""
    if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):
        return None
    reason = error.strerror or said(error)
    problem, cure = _OF_SYSTEM.get(error.errno or 0, ("can't be read or written ({said})", "look at it and its folder"))
    file = "" if error.filename is None else str(error.filename)
    named = subject or file if error.errno in _OF_DISK else ": ".join(filter(None, (subject, file)))
    return ArtifactError(_line(named, problem.format(said=reason), cure))


def _line(subject: str, problem: str, cure: str) -> str:
    return f"{subject}: {problem}; {cure}" if subject else f"{problem}; {cure}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
