"""The teacher: the uncompressed model's last hidden states, which the head turns into its logits.

It runs once. What it says of the training text is kept on disk in bfloat16 and read a microbatch at a time; a later
tuning of the same model on the same text reads it again. Where the disk or its limit does not allow that, the model
stays in memory and is run again for every microbatch.
"""

import hashlib
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from filelock import FileLock
from filelock import Timeout as LockTimeout
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.errors import ArtifactError
from ovexport.models.head import hidden_states
from ovexport.models.matrix_view import weight_digest
from ovexport.progress import Listener, Progress
from ovexport.storage.digests import bytes_digest, json_digest
from ovexport.storage.files import atomic_folder, files_in
from ovexport.storage.records import Record, write_record
from ovexport.storage.tensorfile import TensorFile, TensorWriter
from ovexport.versions import installed_version
from ovexport.wording import byte_size

logger = logging.getLogger(__name__)

_TENSORS = "hidden_states.safetensors"
_RECORD = "teacher.json"
_FREE_SHARE = 0.9
_FORMAT = 1  # of the states; another number, and those from before are not read any more


class Teacher(Protocol):
    """Says what the uncompressed model's last hidden states are."""

    def states(self, indices: list[int]) -> Tensor:
        """Of some sequences, (sequences, length, hidden size), on the CPU or the tuning's device."""


class CacheRecord(Record):
    """teacher.json in a folder of the cache: what its states are of."""

    key: str
    sequences: int
    length: int
    hidden_size: int


class CachedTeacher:
    """Hidden states in a file, memory-mapped."""

    def __init__(self, folder: Path, sequences: int) -> None:
        self._states = TensorFile(folder / _TENSORS)
        if len(self._states) != sequences:
            raise ArtifactError(f"{folder}: holds {len(self._states)} sequences, not {sequences}; remove it")

    def states(self, indices: list[int]) -> Tensor:
        """As Teacher."""
        return torch.from_numpy(np.stack([self._states[str(index)] for index in indices])).bfloat16()


class LiveTeacher:
    """The model itself, run whenever it is asked."""

    def __init__(self, network: PreTrainedModel, tokens: Tensor, autocast: torch.autocast) -> None:
        self._network = network
        self._tokens = tokens
        self._autocast = autocast

    @torch.no_grad()
    def states(self, indices: list[int]) -> Tensor:
        """As Teacher."""
        with self._autocast:
            return hidden_states(self._network, self._tokens[indices].to(self._network.device)).bfloat16()


def cached_teacher(
    network: PreTrainedModel,
    tokens: Tensor,
    autocast: torch.autocast,
    *,
    width: int,
    batch_size: int,
    limit_bytes: float,
    listener: Listener,
) -> CachedTeacher | None:
    """The teacher's states from the cache, computed if they are not there yet; None if there is no room for them.

    Args:
        tokens: all training sequences, (sequences, length).
        width: of a hidden state.
        limit_bytes: of the whole cache; the folders used longest ago make room.
    """
    size = 2 * tokens.numel() * width
    folder = cache_folder()
    key = _key(network, tokens, autocast)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):  # a second process waits, and finds what the first one wrote
            if (cached := _read(folder / key, len(tokens))) is not None:
                return cached
            if size <= limit_bytes and _room(folder, size, limit_bytes):
                _write(network, tokens, autocast, folder / key, key, width, batch_size, listener)
                return CachedTeacher(folder / key, len(tokens))
    except (ArtifactError, OSError) as error:
        logger.warning("  %s can't hold the teacher's hidden states: %s", folder, error)
    logger.info("  no room for %s of the teacher's hidden states; it runs at every step", byte_size(size))
    return None


def _read(folder: Path, sequences: int) -> CachedTeacher | None:
    if not (folder / _RECORD).is_file():
        return None
    try:
        cached = CachedTeacher(folder, sequences)
    except ArtifactError as error:
        logger.warning("  the cached hidden states are damaged and made again: %s", error)
        return None
    os.utime(folder)
    return cached


def cache_folder() -> Path:
    """OVEXPORT_CACHE, or the user's cache folder."""
    named = os.environ.get("OVEXPORT_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ovexport"


@torch.no_grad()
def _write(
    network: PreTrainedModel,
    tokens: Tensor,
    autocast: torch.autocast,
    folder: Path,
    key: str,
    width: int,
    batch_size: int,
    listener: Listener,
) -> None:
    shape = (tokens.shape[1], width)
    layout = {str(index): ("BF16", shape) for index in range(len(tokens))}
    with atomic_folder(folder) as written:
        with TensorWriter(written / _TENSORS, layout) as writer:
            for begin in range(0, len(tokens), batch_size):
                with autocast:
                    states = hidden_states(network, tokens[begin : begin + batch_size].to(network.device))
                bits = states.bfloat16().cpu().view(torch.int16).numpy().view(np.uint16)
                for offset, row in enumerate(bits):
                    writer.write(str(begin + offset), row)
                listener(Progress(task="teacher", done=min(begin + batch_size, len(tokens)), total=len(tokens)))
        record = CacheRecord(key=key, sequences=len(tokens), length=shape[0], hidden_size=shape[1])
        write_record(record, written / _RECORD)


def _key(network: PreTrainedModel, tokens: Tensor, autocast: torch.autocast) -> str:
    weights = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        weights.update(f"{name} {weight_digest(value)}".encode())
    return json_digest(
        {
            "format": [_FORMAT, network.device.type],
            "weights": weights.hexdigest(),
            "config": network.config.to_json_string(),
            "tokens": [list(tokens.shape), bytes_digest(tokens.numpy())],
            "arithmetic": str(autocast.fast_dtype if autocast._enabled else torch.float32),
            "versions": [installed_version("torch"), installed_version("transformers")],
        }
    )


def _room(folder: Path, size: int, limit_bytes: float) -> bool:
    """Make room for so many bytes, within the limit and on the disk; what a kill left half written goes first."""
    entries = [entry for entry in folder.iterdir() if entry.is_dir()]
    sizes = {entry: sum(file.stat().st_size for file in files_in(entry)) for entry in entries}
    left, free = sum(sizes.values()), _FREE_SHARE * shutil.disk_usage(folder).free
    if size > min(limit_bytes, free + left):
        return False
    for entry in sorted(entries, key=lambda entry: ((entry / _RECORD).is_file(), entry.stat().st_mtime)):
        if left + size <= limit_bytes and size <= free:
            break
        with suppress(LockTimeout), FileLock(folder / f"{_key_of(entry)}.lock", blocking=False):
            shutil.rmtree(entry)
            left, free = left - sizes[entry], free + sizes[entry]
    return left + size <= limit_bytes and size <= free


def _key_of(entry: Path) -> str:
    """The key of a folder, finished or half written."""
    return entry.name.removeprefix(".").partition(".")[0]
