"""Checkpoints of ours."""

from collections.abc import Sequence
from pathlib import Path

from ovexport.artifacts import Checkpoint
from ovexport.readers.reader import CheckpointReader, readers
from ovexport.recipe import ModelSpec


@readers.register("ovexport")
class OwnReader(CheckpointReader):
    """A checkpoint that ovexport wrote; it stays where it lies."""

    takes = "a folder with checkpoint.json"

    def recognizes(self, path: Path) -> bool:
        """As CheckpointReader."""
        return (path / "checkpoint.json").is_file()

    def read(self, path: Path, model: ModelSpec, out: Path, *, ranks: Sequence[int] | None) -> Checkpoint:
        """As CheckpointReader; `strip` compares it with the base model."""
        return Checkpoint(path)
