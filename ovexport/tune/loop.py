"""The loop: steps, validation, saving, and the checkpoint of the best step."""

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from ovexport.artifacts import Checkpoint, PreparedData, Validation
from ovexport.errors import RecipeError, TuningDivergedError
from ovexport.progress import Listener, Progress, silent
from ovexport.recipe import ModelSpec, SearchSpec, TuneSpec
from ovexport.reports import SearchReport
from ovexport.search.search import search
from ovexport.storage.files import atomic_folder
from ovexport.storage.records import write_record
from ovexport.storage.tensorfile import write_tensors
from ovexport.tune.log import TuningLog
from ovexport.tune.store import StateStore
from ovexport.tune.tuner import Tuner
from ovexport.versions import stack_versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tuned:
    """What tuning leaves; no report where there were no ranks to choose."""

    checkpoint: Checkpoint
    search: SearchReport | None


def tune(
    start: Checkpoint,
    model: ModelSpec,
    spec: TuneSpec,
    data: PreparedData,
    out: Path,
    *,
    logs: Path,
    identity: str,
    choice: SearchSpec | None = None,
    listener: Listener = silent,
) -> Tuned:
    """Tune the starting point, keep the parameters of the step with the least validation figure and, where adapters are
    elastic, choose their ranks.

    Ctrl-C ends the step that is under way, saves the state and is raised then; a second one is raised at once. The
    folder `tuning` beside `out` holds the states; it is the caller's to remove once `out` counts as done.

    Args:
        start: the compress stage's checkpoint; validated first, so that the result is never worse on validation.
        logs: takes tuning.jsonl, search.jsonl and TensorBoard events.
        identity: names this very tuning, up to the choice of ranks; one with the same identity goes on where it was
            saved.
        choice: how ranks are chosen.

    Raises:
        TuningDivergedError: loss or gradient were not finite for too many steps on end; the best checkpoint so far is
            in `out`.
        RecipeError: as check_device, or ranks that were given do not suit the adapters.
        UnsupportedModelError: the model's logits are not made as tuning relies on.
    """
    check_device(spec)
    choice = choice or SearchSpec()
    if choice.ranks is not None:
        start.manifest.elastic_ranks.chosen(choice.ranks, "search.ranks")
    torch.manual_seed(spec.seed)
    tuner = Tuner(start, model, spec, data, device_of(spec), listener)
    store = StateStore(out.with_name("tuning"), identity)
    with TuningLog(logs) as log:
        try:
            _run(tuner, store, log, listener)
        except TuningDivergedError as error:
            median = tuner.space.by_layer(tuner.space.median)
            checkpoint = _write_checkpoint(start, tuner, store, data, out, median)
            raise TuningDivergedError(
                f"{error}; the best one, of step {checkpoint.manifest.steps}, is in {out}"
            ) from error
        losses = log.losses()
    found = search(tuner, store.best(), choice, losses, logs / "search.jsonl", identity, listener)
    return Tuned(_write_checkpoint(start, tuner, store, data, out, found.ranks), found.report)


def check_device(spec: TuneSpec) -> None:
    """Refuse a device that is not there.

    Raises:
        RecipeError: it is not.
    """
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError('tune.device="cuda": no CUDA device here; use "auto" or "cpu"')


def device_of(spec: TuneSpec) -> torch.device:
    """The device to tune on."""
    return torch.device("cuda" if spec.device != "cpu" and torch.cuda.is_available() else "cpu")


def _run(tuner: Tuner, store: StateStore, log: TuningLog, listener: Listener) -> None:
    """The steps from where the store stands to the end."""
    spec = tuner.spec
    if store.restore(tuner):
        logger.info("  tuning goes on after step %d of %d", store.state.step, tuner.steps)
        log.forget_after(store.state.step)
    else:
        log.forget_after(-1)
        if tuner.steps and spec.probe_learning_rates:
            _probe(tuner, listener)
        store.begin(tuner, tuner.validate())
        log.write(0, **_finite({tuner.objective.figure: store.state.best_nats}))
    with _interrupts() as interrupted:
        for index in range(store.state.step, tuner.steps):
            if spec.patience is not None and store.state.stale >= spec.patience:
                logger.info("  no better for %d validations: tuning ends at step %d", store.state.stale, index)
                store.save(tuner)
                break
            started = time.monotonic()
            result = tuner.step(index)
            figures = {"loss_nats": result.loss_nats, "gradient_norm": result.gradient_norm}
            figures |= {f"learning_rate_{name}": rate for name, rate in tuner.learning_rates.items()}
            figures["tokens_per_s"] = result.tokens / (time.monotonic() - started)
            store.advance(tuner, taken=result.taken)
            done = index + 1
            last = done == tuner.steps
            if last or done % spec.validate_every == 0:
                validation = tuner.validate()
                figures |= {tuner.objective.figure: validation, **tuner.changes()}
                if (peak := tuner.peak_memory_bytes()) is not None:
                    figures["peak_memory_bytes"] = peak
                store.judge(tuner, validation)
            log.write(done, **_finite(figures))
            if store.state.skipped > spec.most_skipped_steps:
                raise TuningDivergedError(
                    f"tune: loss {result.loss_nats} and gradient norm {result.gradient_norm} at step {done}, the "
                    f"{store.state.skipped}th on end that is not finite; lower tune.learning_rate={spec.learning_rate}"
                )
            listener(Progress(task="tune", done=done, total=tuner.steps, figures=figures))
            if last or interrupted.is_set() or done % spec.save_every == 0:
                store.save(tuner)
            if interrupted.is_set():
                logger.info("  stopped after step %d of %d, which is saved; --resume goes on", done, tuner.steps)
                raise KeyboardInterrupt


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    """What JSON can hold."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _probe(tuner: Tuner, listener: Listener) -> None:
    """Give each learning rate a short tuning of its own, schedule included, and choose the one that validates best."""
    spec = tuner.spec
    found: dict[float, float] = {}
    steps = min(spec.probe_steps, tuner.steps)
    total = steps * len(spec.probe_learning_rates)
    for number, rate in enumerate(spec.probe_learning_rates):
        tuner.begin_anew(rate, steps)
        for index in range(steps):
            tuner.step(index)
            listener(Progress(task="probe", done=number * steps + index + 1, total=total))
        found[rate] = tuner.validate()
        logger.info("  learning rate %g: %s %.3g after %d steps", rate, tuner.objective.figure, found[rate], steps)
    finite = {rate: nats for rate, nats in found.items() if math.isfinite(nats)}
    tuner.begin_anew(min(finite, key=finite.__getitem__, default=spec.learning_rate), tuner.steps)


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


def _write_checkpoint(
    start: Checkpoint, tuner: Tuner, store: StateStore, data: PreparedData, out: Path, ranks: Mapping[str, int]
) -> Checkpoint:
    """The best parameters with their ranks, the digests of the codes they give and what the model says with them."""
    manifest, best, student = start.manifest, store.best(), tuner.student
    tuner.take_up(best, ranks)
    digests = {
        name: quantizer.quantize(student.base_weights[name]).digest() for name, quantizer in student.quantizers.items()
    }
    best_nats = store.state.best_nats
    validation = Validation(figure=tuner.objective.figure, value=best_nats) if math.isfinite(best_nats) else None
    with atomic_folder(out) as folder:
        write_tensors(best, folder / "adapters.safetensors")
        write_tensors(tuner.reference(data.tokens("test")), folder / "reference.safetensors")
        if manifest.replaced_weights:
            write_tensors(
                {name: np.array(value) for name, value in start.weights.items()}, folder / "weights.safetensors"
            )
        write_record(
            manifest.model_copy(
                update={
                    "layers": tuple(
                        layer.model_copy(update={"active_rank": ranks.get(layer.name)}) for layer in manifest.layers
                    ),
                    "digests": digests,
                    "steps": store.state.best_step,
                    "validation": validation,
                    "versions": stack_versions(),
                }
            ),
            folder / "checkpoint.json",
        )
    return Checkpoint(out)
