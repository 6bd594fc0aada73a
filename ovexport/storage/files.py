"""Files and folders written whole or not at all, and what is said where they can't be."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from ovexport.errors import ArtifactError, OvexportError
from ovexport.foreign import NO_SPACE, exhausted

PARTIAL, REPLACED = ".partial", ".replaced"
"""How the names of what is being written end, and of what it takes the place of; both begin with a point."""
_FULL_DISK_BYTES = 1 << 20
_NO_PLACE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOTEMPTY,
    errno.ENOENT,
    errno.ENAMETOOLONG,
)


def write_text(text: str, path: Path) -> None:
    """Write a text file atomically: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    with translated_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to write into, which takes the place of `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}{PARTIAL}")
    shutil.rmtree(temporary, ignore_errors=True)
    with translated_disk_errors(path):
        temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException as error:
        full = shutil.disk_usage(temporary).free < _FULL_DISK_BYTES
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        if full:  # openvino hides ENOSPC in errors of its own
            raise _full_disk(path) from error
        ours = None if isinstance(error, OvexportError) else exhausted(error, str(path))
        if ours is None:
            raise
        raise ours from error
    with translated_disk_errors(path):
        for file in files_in(temporary):
            _fsync(file)
        replaced = path.with_name(f".{path.name}{REPLACED}")
        shutil.rmtree(replaced, ignore_errors=True)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder, with those above it, unless it is there.

    Raises:
        ArtifactError: it can't be made.
    """
    with translated_disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def translated_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, or a place that can't be written, into one clear line.

    Raises:
        ArtifactError: the disk is full, or the folder can't be written.
    """
    try:
        yield
    except OvexportError:
        raise
    except Exception as error:
        ours = exhausted(error, str(path))
        if ours is not None:
            raise ours from error
        if not isinstance(error, OSError):
            raise
        if error.errno in _NO_PLACE:
            raise ArtifactError(f"{path}: can't be written ({error.strerror}); choose another --out") from error
        raise


def _full_disk(path: Path) -> ArtifactError:
    return ArtifactError(f"{path}: {'; '.join(NO_SPACE)}")


def link_file(source: Path, target: Path) -> None:
    """Give a file that nobody writes to another name: a hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def existing_parent(path: Path) -> Path:
    """The nearest folder at or above a path that is there."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.is_dir())


def files_in(path: Path) -> list[Path]:
    """Every file below a folder, sorted; the file itself when it is one."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def leaves_folder(name: str) -> bool:
    """Whether a path is no plain one below a folder: absolute, or by way of `..`, on this system or another."""
    return any(
        path.is_absolute() or bool(path.drive) or ".." in path.parts or not path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def require_free(folder: Path, option: str) -> None:
    """Refuse a folder to write to that holds something already.

    Args:
        option: where the user gave it, such as "--out".

    Raises:
        ArtifactError: it does.
    """
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ArtifactError(f"{folder}: holds something already; choose another {option}")
