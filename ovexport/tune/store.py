"""What a tuning leaves on disk while it runs: the states it can go on from, and its best parameters.

    tuning/step-00000100/state.json, state.safetensors    the last two
    tuning/best-00000050/best.safetensors                 of the step with the least validation figure

Everything is written under another name, synced and renamed, so that a kill at any moment leaves a state whole or not
at all. The best parameters are written before a state says that it has them.
"""

import logging
import math
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ovexport.errors import ArtifactError, TuningDivergedError
from ovexport.storage.files import atomic_folder
from ovexport.storage.records import Record, read_record, write_record
from ovexport.storage.tensorfile import TensorFile, write_tensors
from ovexport.tune.tuner import Tuner

logger = logging.getLogger(__name__)

_KEPT = 2


class TunerState(Record):
    """state.json: where an interrupted tuning goes on.

    What is drawn at random is the order of the examples and, for elastic adapters, their ranks; both follow from the
    recipe's seed and the step, and so do the learning rates.

    Attributes:
        identity: digest of all that this tuning depends on; a state of another tuning is not taken up.
        learning_rate: of the adapters, which a probe may have chosen.
        step: optimizer steps begun, the skipped ones too.
        updates: steps that changed the parameters.
        skipped: steps whose loss or gradient was not finite, one after the other up to this one.
        best_step, best_nats: of the best parameters, by validation.
        stale: validations since the best one.
    """

    identity: str
    learning_rate: float | None = None
    step: int = 0
    updates: int = 0
    skipped: int = 0
    best_step: int = 0
    best_nats: float = math.inf
    stale: int = 0


class StateStore:
    """The state of a tuning, and the folder that an interrupted one goes on from.

    Attributes:
        state: of the step that was taken last.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.state = TunerState(identity=identity)

    def restore(self, tuner: Tuner) -> bool:
        """Bring the tuner to the newest saved state of this very tuning that is whole, when there is one."""
        for folder in reversed(self._states()):
            try:
                saved = read_record(folder / "state.json", TunerState)
                if saved.identity != self.state.identity:
                    continue
                self._best(saved.best_step)
                tuner.begin_anew(saved.learning_rate or tuner.learning_rate, tuner.steps)
                tuner.restore(TensorFile(folder / "state.safetensors"), saved.step, saved.updates)
            except (ArtifactError, KeyError, RuntimeError) as error:  # RuntimeError: tensors of another shape
                logger.warning("  a saved state is damaged and left: %s: %s", folder.name, error)
                continue
            self.state = saved
            return True
        return False

    def begin(self, tuner: Tuner, nats: float) -> None:
        """Take the starting point for the best so far, and forget what another tuning left.

        Raises:
            TuningDivergedError: its validation is not finite.
        """
        self.clear()
        self.state = TunerState(identity=self.state.identity, learning_rate=tuner.learning_rate)
        self._keep(tuner, nats)
        if tuner.steps and not math.isfinite(nats):
            raise TuningDivergedError(
                f"tune: the starting point's validation is {nats}; the model's logits are not finite on this text"
            )

    def advance(self, tuner: Tuner, *, taken: bool) -> None:
        """Count a step."""
        self.state = self.state.model_copy(
            update={
                "step": self.state.step + 1,
                "updates": tuner.updates,
                "skipped": 0 if taken else self.state.skipped + 1,
            }
        )

    def judge(self, tuner: Tuner, nats: float) -> None:
        """Keep the present parameters when their validation figure is the least so far."""
        if nats < self.state.best_nats:
            self._keep(tuner, nats)
        else:
            self.state = self.state.model_copy(update={"stale": self.state.stale + 1})

    def save(self, tuner: Tuner) -> None:
        """Write the present state, all or nothing; what is not needed any more goes."""
        with atomic_folder(self.path / f"step-{self.state.step:08d}") as folder:
            write_tensors(tuner.state(), folder / "state.safetensors")
            write_record(self.state, folder / "state.json")
        readable = {folder: state for folder in self._states() if (state := _read(folder)) is not None}
        kept = sorted(readable)[-_KEPT:]
        needed = {*kept, *(self._best_path(readable[folder].best_step) for folder in kept)}
        for folder in {*self.path.glob("step-*"), *self.path.glob("best-*")} - needed:
            shutil.rmtree(folder)

    def best(self) -> dict[str, NDArray[np.float32]]:
        """The best parameters so far, by name."""
        file = self._best(self.state.best_step)
        return {name: np.array(file[name]) for name in file}

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _keep(self, tuner: Tuner, nats: float) -> None:
        with atomic_folder(self._best_path(self.state.step)) as folder:
            write_tensors(tuner.kept(), folder / "best.safetensors")
        self.state = self.state.model_copy(update={"best_step": self.state.step, "best_nats": nats, "stale": 0})

    def _best(self, step: int) -> TensorFile:
        return TensorFile(self._best_path(step) / "best.safetensors")

    def _best_path(self, step: int) -> Path:
        return self.path / f"best-{step:08d}"

    def _states(self) -> list[Path]:
        return sorted(folder for folder in self.path.glob("step-*") if (folder / "state.json").is_file())


def _read(folder: Path) -> TunerState | None:
    try:
        return read_record(folder / "state.json", TunerState)
    except ArtifactError:
        return None
