"""What a tuning leaves behind while it runs: the state it can go on from, and its log."""

import json
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from ovexport.artifacts import Record, atomic_folder, read_record, write_record
from ovexport.tensorfile import TensorFile, write_tensors
from ovexport.tune.tuner import Tuner


class TunerState(Record):
    """state.json: where an interrupted tuning goes on, beside state.safetensors and best.safetensors.

    Attributes:
        identity: digest of all that this tuning depends on; a state of another tuning is not taken up.
        step: optimizer steps taken.
        best_step, best_kl_nats: of the parameters in best.safetensors, by validation.
    """

    identity: str
    step: int
    best_step: int
    best_kl_nats: float


class StateStore:
    """The folder that an interrupted tuning goes on from."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.identity = identity
        self.best: dict[str, NDArray[np.float32]] = {}
        self.state: TunerState | None = None

    def load(self, tuner: Tuner) -> TunerState | None:
        """Restore the tuner from the saved state, when there is one of this very tuning."""
        if not (self.path / "state.json").is_file():
            return None
        state = read_record(self.path / "state.json", TunerState)
        if state.identity != self.identity:
            return None
        tuner.restore(TensorFile(self.path / "state.safetensors"), state.step)
        best = TensorFile(self.path / "best.safetensors")
        self.best = {key: np.array(best[key]) for key in best}
        self.state = state
        return state

    def save_best(self, tuner: Tuner) -> None:
        """Keep the present parameters as the best so far."""
        self.best = {key: value.detach().cpu().numpy().copy() for key, value in tuner.parameters.items()}

    def save(self, tuner: Tuner, state: TunerState) -> None:
        """Write the present state and the best parameters, all or nothing."""
        self.state = state
        with atomic_folder(self.path) as folder:
            write_tensors(tuner.state(), folder / "state.safetensors")
            write_tensors(self.best, folder / "best.safetensors")
            write_record(state, folder / "state.json")

    def clear(self) -> None:
        """Remove the folder; the checkpoint holds what is worth keeping."""
        if self.path.is_dir():
            for file in self.path.iterdir():
                file.unlink()
            self.path.rmdir()


class TuningLog:
    """A JSON line per step, and the same figures for TensorBoard."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._accelerator = accelerator

    def __enter__(self) -> "TuningLog":
        self._accelerator.init_trackers("tuning")
        return self

    def __exit__(self, *_: object) -> None:
        self._accelerator.end_training()

    def write(self, step: int, **figures: float) -> None:
        """Append the figures of a step."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        self._accelerator.log(figures, step=step)

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps that will be taken again, and those of an earlier tuning."""
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        starts = [index for index, line in enumerate(lines) if json.loads(line)["step"] == 0]
        kept = [line for line in lines[starts[-1] if starts else 0 :] if json.loads(line)["step"] <= step]
        self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
