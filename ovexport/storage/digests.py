"""SHA-256 of files, buffers and JSON."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovexport.storage.files import leaves_folder


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def bytes_digest(data: Any) -> str:
    """SHA-256 of a contiguous buffer."""
    return hashlib.sha256(memoryview(data).cast("B")).hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_files(files: Mapping[str, str], root: Path) -> list[str]:
    """The paths that lead out of `root`, are missing there, or whose SHA-256 is not the one given."""
    return [
        name
        for name, digest in files.items()
        if leaves_folder(name) or not (root / name).is_file() or file_digest(root / name) != digest
    ]
