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
from ovexport.storage.records import read_record, write_record
from ovexport.storage.tensorfile import TensorFile, write_tensors
from ovexport.tune.state import TuningState
from ovexport.tune.trainer import Trainer

logger = logging.getLogger(__name__)

_KEPT = 2


class StateStore:
    """The state of a tuning, and the folder that an interrupted one goes on from.

    Args:
        identity: digest of all that this tuning depends on.

    Attributes:
        state: of the step that was taken last.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.state = TuningState(identity=identity)

    def restore(self, trainer: Trainer) -> bool:
        """Bring the trainer to the newest undamaged state of this very tuning, if there is one."""
        for folder in reversed(self._states()):
            try:
                saved = read_record(folder / "state.json", TuningState)
                if saved.identity != self.state.identity:
                    continue
                self._best(saved.best_step)
                trainer.reset(saved.learning_rate or trainer.optimizer.learning_rate, trainer.steps)
                trainer.restore(TensorFile(folder / "state.safetensors"), saved.step, saved.updates)
            except (ArtifactError, KeyError, RuntimeError) as error:  # RuntimeError: tensors of another shape
                logger.warning("  a saved state is damaged and not used: %s: %s", folder.name, error)
                continue
            self.state = saved
            return True
        return False

    def begin(self, trainer: Trainer, value: float) -> None:
        """Take the starting point for the best so far, and forget what another tuning left.

        Raises:
            TuningDivergedError: its validation is not finite.
        """
        self.clear()
        self.state = TuningState(identity=self.state.identity, learning_rate=trainer.optimizer.learning_rate)
        self._keep(trainer, value)
        if trainer.steps and not math.isfinite(value):
            raise TuningDivergedError(
                f"tune: the starting point's validation is {value}; the model's logits are not finite on this text"
            )

    def advance(self, trainer: Trainer, *, taken: bool) -> None:
        """Count a step."""
        self.state = self.state.with_values(
            step=self.state.step + 1,
            updates=trainer.optimizer.updates,
            skipped=0 if taken else self.state.skipped + 1,
        )

    def judge(self, trainer: Trainer, value: float) -> None:
        """Keep the present parameters when their validation figure is the least so far."""
        if value < self.state.best_value:
            self._keep(trainer, value)
        else:
            self.state = self.state.with_values(stale=self.state.stale + 1)

    def save(self, trainer: Trainer) -> None:
        """Write the present state, all or nothing; what is not needed any more goes."""
        with atomic_folder(self.path / f"step-{self.state.step:08d}") as folder:
            write_tensors(trainer.state(), folder / "state.safetensors")
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

    def _keep(self, trainer: Trainer, value: float) -> None:
        with atomic_folder(self._best_path(self.state.step)) as folder:
            write_tensors(trainer.kept(), folder / "best.safetensors")
        self.state = self.state.with_values(best_step=self.state.step, best_value=value, stale=0)

    def _best(self, step: int) -> TensorFile:
        return TensorFile(self._best_path(step) / "best.safetensors")

    def _best_path(self, step: int) -> Path:
        return self.path / f"best-{step:08d}"

    def _states(self) -> list[Path]:
        return sorted(folder for folder in self.path.glob("step-*") if (folder / "state.json").is_file())


def _read(folder: Path) -> TuningState | None:
    try:
        return read_record(folder / "state.json", TuningState)
    except ArtifactError:
        return None
