"""The stage: steps, validation and saving, and the checkpoint of the best step."""

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from ovexport.artifacts import Checkpoint, PreparedData
from ovexport.errors import TuningDivergedError
from ovexport.models.device import Compute, require_device
from ovexport.progress import Listener, Progress, silent
from ovexport.recipe import ModelSpec, TuneSpec
from ovexport.tune.log import TuningLog
from ovexport.tune.movement import moved_fractions
from ovexport.tune.result import write_tuned
from ovexport.tune.store import StateStore
from ovexport.tune.trainer import StepResult, Trainer, make_trainer

logger = logging.getLogger(__name__)


def tune(
    start: Checkpoint,
    model: ModelSpec,
    spec: TuneSpec,
    data: PreparedData,
    out: Path,
    *,
    logs: Path,
    identity: str,
    listener: Listener = silent,
) -> Checkpoint:
    """Tune the starting point, and keep the parameters of the step with the least validation figure; elastic adapters
    have the median ranks.

    Ctrl-C ends the step that is under way, saves the state and is raised then; a second one is raised at once. The
    folder `tuning` beside `out` holds the states; it is the caller's to remove once `out` counts as done.

    Args:
        start: the compress stage's checkpoint; validated first, so that the result is never worse on validation.
        logs: takes tuning.jsonl and TensorBoard events.
        identity: digest of all that this tuning depends on; one with the same identity goes on where it was saved.

    Raises:
        TuningDivergedError: too many consecutive steps were not finite; the best checkpoint so far is in `out`.
        RecipeError, PlugInError: the device is not there; the objective is unknown or fails.
        UnsupportedModelError: the model computes its logits otherwise than tuning needs.
    """
    require_device(spec.device)
    torch.manual_seed(spec.seed)
    compute = Compute.of(spec.device, spec.precision)
    trainer = make_trainer(start, model, spec, data, compute, listener)
    store = StateStore(out.with_name("tuning"), identity)
    with TuningLog(logs) as log:
        try:
            _Loop(trainer, store, log, compute, listener).run()
        except TuningDivergedError as error:
            write_tuned(trainer, store, log.losses(), data, out)
            raise TuningDivergedError(f"{error}; the best one, of step {store.state.best_step}, is in {out}") from error
        return write_tuned(trainer, store, log.losses(), data, out)


class _Loop:
    """The steps of a tuning, from where its store stands to the end."""

    def __init__(
        self, trainer: Trainer, store: StateStore, log: TuningLog, compute: Compute, listener: Listener
    ) -> None:
        self._trainer = trainer
        self._spec = trainer.spec
        self._store = store
        self._log = log
        self._compute = compute
        self._listener = listener

    def run(self) -> None:
        """Take every step.

        Raises:
            TuningDivergedError: too many consecutive steps were not finite.
            KeyboardInterrupt: after the step that was under way, which is saved.
        """
        self._begin()
        steps, store = self._trainer.steps, self._store
        with _interrupts() as interrupted:
            for index in range(store.state.step, steps):
                if self._is_stale():
                    logger.info("  no better for %d validations: tuning ends at step %d", store.state.stale, index)
                    store.save(self._trainer)
                    return
                self._step(index)
                done = index + 1
                if done == steps or interrupted.is_set() or done % self._spec.save_every == 0:
                    store.save(self._trainer)
                if interrupted.is_set():
                    logger.info("  stopped after step %d of %d, which is saved; --resume goes on", done, steps)
                    raise KeyboardInterrupt

    def _begin(self) -> None:
        """Go on where this very tuning was saved, or begin with the starting point's validation."""
        trainer, store = self._trainer, self._store
        if store.restore(trainer):
            logger.info("  tuning goes on after step %d of %d", store.state.step, trainer.steps)
            self._log.forget_after(store.state.step)
            return
        self._log.forget_after(-1)
        if trainer.steps and self._spec.probe_learning_rates:
            _probe(trainer, self._listener)
        store.begin(trainer, trainer.validate())
        self._log.write(0, **_finite({trainer.objective.figure: store.state.best_value}))

    def _is_stale(self) -> bool:
        return self._spec.patience is not None and self._store.state.stale >= self._spec.patience

    def _step(self, index: int) -> None:
        """One step with its validation, if it has one, and its lines in the log."""
        trainer, done = self._trainer, index + 1
        started = time.monotonic()
        result = trainer.step(index)
        seconds = time.monotonic() - started
        self._store.advance(trainer, taken=result.taken)
        figures = _step_figures(result, trainer, seconds)
        if done == trainer.steps or done % self._spec.validate_every == 0:
            figures |= self._validate()
        self._log.write(done, **_finite(figures))
        self._require_finite(result, done)
        self._listener(Progress(task="tune", done=done, total=trainer.steps, figures=figures))

    def _validate(self) -> dict[str, float]:
        """The validation's figures; the parameters are kept if they are the best so far."""
        trainer = self._trainer
        value = trainer.validate()
        figures = {trainer.objective.figure: value, **moved_fractions(trainer.student, trainer.start)}
        if (peak := self._compute.peak_memory_bytes()) is not None:
            figures["peak_memory_bytes"] = peak
        self._store.judge(trainer, value)
        return figures

    def _require_finite(self, result: StepResult, step: int) -> None:
        """Give up after too many consecutive steps that were not finite."""
        skipped = self._store.state.skipped
        if skipped > self._spec.most_skipped_steps:
            raise TuningDivergedError(
                f"tune: {skipped} consecutive steps, up to step {step}, had a non-finite loss or gradient (loss "
                f"{result.loss_nats}, gradient norm {result.gradient_norm}); lower "
                f"tune.learning_rate={self._spec.learning_rate}"
            )


def _step_figures(result: StepResult, trainer: Trainer, seconds: float) -> dict[str, float]:
    rates = {f"learning_rate_{name}": rate for name, rate in trainer.optimizer.learning_rates.items()}
    figures = {"loss_nats": result.loss_nats, "gradient_norm": result.gradient_norm}
    return figures | rates | {"tokens_per_s": result.tokens / seconds}


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    """What JSON can hold."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _probe(trainer: Trainer, listener: Listener) -> None:
    """Give each learning rate a short tuning of its own, schedule included, and choose the one that validates best."""
    spec = trainer.spec
    validated: dict[float, float] = {}
    steps = min(spec.probe_steps, trainer.steps)
    total = steps * len(spec.probe_learning_rates)
    for number, rate in enumerate(spec.probe_learning_rates):
        trainer.reset(rate, steps)
        for index in range(steps):
            trainer.step(index)
            listener(Progress(task="probe", done=number * steps + index + 1, total=total))
        validated[rate] = trainer.validate()
        figure = trainer.objective.figure
        logger.info("  learning rate %g: %s %.3g after %d steps", rate, figure, validated[rate], steps)
    finite = {rate: value for rate, value in validated.items() if math.isfinite(value)}
    trainer.reset(min(finite, key=finite.__getitem__, default=spec.learning_rate), trainer.steps)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C; the second one is a KeyboardInterrupt as ever. Signals reach the main thread only."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    former = signal.getsignal(signal.SIGINT) or signal.default_int_handler  # None: it was not set from Python

    def note(_number: int, _frame: FrameType | None) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, former)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, former)
