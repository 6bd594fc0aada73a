"""The tuning's log: a JSON line per step, and the same figures for TensorBoard."""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.utils.tensorboard import SummaryWriter

from ovexport.storage.files import make_folder, translated_disk_errors
from ovexport.storage.records import read_json_lines


class TuningLog:
    """tuning.jsonl and TensorBoard events in a folder."""

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        self._path = folder / "tuning.jsonl"
        self._folder = folder

    def __enter__(self) -> Self:
        with translated_disk_errors(self._folder):
            self._board = SummaryWriter(str(self._folder / "tuning"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with translated_disk_errors(self._folder):
            self._board.close()

    def write(self, step: int, **figures: float) -> None:
        """Append the figures of a step."""
        with translated_disk_errors(self._folder):
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)

    def losses(self) -> list[tuple[int, float]]:
        """The steps that are in the log, from 0, each with its training loss in nats."""
        entries = read_json_lines(self._path)
        return [(int(entry["step"]) - 1, float(entry["loss_nats"])) for entry in entries if "loss_nats" in entry]

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be taken again, and those of an earlier tuning."""
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        steps = [_step(line) for line in lines]
        begin = len(steps) - 1 - steps[::-1].index(0) if 0 in steps else 0
        kept = [line for line, taken in zip(lines[begin:], steps[begin:], strict=True) if taken <= step]
        self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _step(line: str) -> float:
    """The step of a line; infinity for one that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return math.inf
