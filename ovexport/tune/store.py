"""What a tuning leaves behind while it runs: the state it can go on from, and its log."""

import json
import logging
import math
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from ovexport.artifacts import Record, atomic_folder, read_record, write_record
from ovexport.errors import ArtifactError, TuningDivergedError
from ovexport.tensorfile import TensorFile, write_tensors
from ovexport.tune.tuner import Tuner

logger = logging.getLogger(__name__)


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
    """The state of a tuning and its best parameters, and the folder that an interrupted tuning goes on from.

    Attributes:
        state: of the step that was taken last.
        best: the parameters with the least validation divergence, by name.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self.state = TunerState(identity=identity, step=0, best_step=0, best_kl_nats=math.inf)
        self.best: dict[str, NDArray[np.float32]] = {}

    def restore(self, tuner: Tuner) -> bool:
        """Bring the tuner to the saved state, when there is one of this very tuning."""
        if not (self._path / "state.json").is_file():
            return False
        try:
            saved = read_record(self._path / "state.json", TunerState)
            if saved.identity != self.state.identity:
                return False
            best = TensorFile(self._path / "best.safetensors")
            self.best = {key: np.array(best.require(key)) for key in tuner.parameters}
            tuner.restore(TensorFile(self._path / "state.safetensors"), saved.step)
        except ArtifactError as error:
            logger.warning("  tuning begins anew, its saved state is damaged: %s", error)
            return False
        self.state = saved
        return True

    def begin(self, tuner: Tuner, kl_nats: float) -> None:
        """Take the starting point for the best so far.

        Raises:
            TuningDivergedError: its divergence is not finite.
        """
        self._keep(tuner, 0, kl_nats)
        if not math.isfinite(kl_nats):
            raise TuningDivergedError(
                f"tune: the starting point's divergence is {kl_nats}; the model's logits are not finite on this text"
            )

    def advance(self, tuner: Tuner, kl_nats: float | None) -> None:
        """Count a step, and keep its parameters when its validation divergence is the least so far."""
        step = self.state.step + 1
        if kl_nats is not None and kl_nats < self.state.best_kl_nats:
            self._keep(tuner, step, kl_nats)
        self.state = self.state.model_copy(update={"step": step})

    def save(self, tuner: Tuner) -> None:
        """Write the present state and the best parameters, all or nothing."""
        with atomic_folder(self._path) as folder:
            write_tensors(tuner.state(), folder / "state.safetensors")
            write_tensors(self.best, folder / "best.safetensors")
            write_record(self.state, folder / "state.json")

    def _keep(self, tuner: Tuner, step: int, kl_nats: float) -> None:
        self.best = {key: value.detach().cpu().numpy().copy() for key, value in tuner.parameters.items()}
        self.state = self.state.model_copy(update={"best_step": step, "best_kl_nats": kl_nats})

    def clear(self) -> None:
        """Remove the folder; the checkpoint holds what is worth keeping."""
        if self._path.is_dir():
            for file in self._path.iterdir():
                file.unlink()
            self._path.rmdir()


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
