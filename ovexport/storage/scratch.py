"""Folders for work in progress beside what is written, and what killed processes left of theirs.

A scratch folder holds a lock for as long as its process lives; the operating system frees it however that ends. So one
that has no lock was left by a kill, one whose lock is held is in use, and one without the lock's file is not ours.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from filelock import FileLock
from filelock import Timeout as LockTimeout

from ovexport.storage.files import PARTIAL, REPLACED, translated_disk_errors

_PREFIX = ".ovexport-"
_LOCK = "ovexport.lock"


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder of its own in `parent`, removed at the end; those that kills left there go first.

    Raises:
        ArtifactError: the parent can't be written.
    """
    with translated_disk_errors(parent):
        clear_scratch(parent)
        path = Path(mkdtemp(dir=parent, prefix=_PREFIX))
        lock = FileLock(path / _LOCK)
        lock.acquire()
    try:
        yield path
    finally:
        lock.release()
        shutil.rmtree(path, ignore_errors=True)


def clear_scratch(parent: Path) -> None:
    """Remove the scratch folders in `parent` that no process holds any more."""
    for path in parent.glob(f"{_PREFIX}*"):
        if path.is_symlink() or not (path / _LOCK).is_file():
            continue
        with suppress(LockTimeout, OSError), FileLock(path / _LOCK, blocking=False):
            shutil.rmtree(path, ignore_errors=True)


def clear_partial(folder: Path, names: Iterable[str]) -> None:
    """Remove what kills left half written of the files and folders of these names, and of all that lies in them.

    Args:
        folder: that nobody else writes to.
    """
    for name in names:
        path = folder / name
        inside = [left for ending in (PARTIAL, REPLACED) for left in path.rglob(f".*{ending}")] if path.is_dir() else []
        for left in (*inside, path.with_name(f".{path.name}{PARTIAL}"), path.with_name(f".{path.name}{REPLACED}")):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)


def move_folder(made: Path, wanted: Path) -> None:
    """Let a folder take the place of an empty one, or of none.

    Raises:
        ArtifactError: the place holds something by now, or can't be written.
    """
    with translated_disk_errors(wanted):
        if wanted.is_dir():
            wanted.rmdir()
        wanted.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, wanted)
