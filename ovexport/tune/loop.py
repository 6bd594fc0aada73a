"""The loop: steps, validation, saving, and the checkpoint of the best step."""

import logging
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

from ovexport.artifacts import Checkpoint, PreparedData, atomic_folder, write_record
from ovexport.errors import RecipeError, TuningDivergedError
from ovexport.progress import Listener, Progress, silent
from ovexport.recipe import ModelSpec, TuneSpec
from ovexport.tensorfile import write_tensors
from ovexport.tune.store import StateStore, TuningLog
from ovexport.tune.tuner import Tuner
from ovexport.versions import stack_versions

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
    """Tune the starting point and keep the parameters of the step with the least validation divergence.

    Args:
        start: the compress stage's checkpoint; validated first, so that the result is never worse on validation.
        logs: takes tuning.jsonl and TensorBoard events.
        identity: names this very tuning; an interrupted one with the same identity goes on where it was saved.

    Raises:
        TuningDivergedError: the loss is not finite; the best checkpoint so far is in `out`.
        RecipeError: the device is not there.
    """
    if spec.objective == "task":
        raise RecipeError('tune.objective="task" can be planned, not run, in this version; use "distillation"')
    set_seed(spec.seed)
    accelerator = _accelerator(spec, logs)
    tuner = Tuner(start, model, spec, data, accelerator)
    store = StateStore(out.with_name("tuning"), identity)
    with TuningLog(logs / "tuning.jsonl", accelerator) as log:
        try:
            _run(tuner, store, log, spec, listener)
        except TuningDivergedError:
            _write_checkpoint(start, tuner, store, data, out)
            raise
    checkpoint = _write_checkpoint(start, tuner, store, data, out)
    store.clear()
    return checkpoint


def _run(tuner: Tuner, store: StateStore, log: TuningLog, spec: TuneSpec, listener: Listener) -> None:
    """The steps from where the store stands to the end."""
    if store.restore(tuner):
        logger.info("  tuning goes on after step %d of %d", store.state.step, tuner.steps)
        log.forget_after(store.state.step)
    else:
        log.forget_after(-1)
        store.begin(tuner, tuner.validate())
        log.write(0, validation_kl_nats=store.state.best_kl_nats)
    tokens = spec.batch_size * spec.gradient_accumulation_steps * tuner.train.shape[1]
    for index in range(store.state.step, tuner.steps):
        started = time.monotonic()
        rate = tuner.optimizer.param_groups[0]["lr"]
        loss, norm = tuner.step(index)
        figures = {
            "loss_kl_nats": loss,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens_per_s": tokens / (time.monotonic() - started),
        }
        done = index + 1
        last = done == tuner.steps
        if last or done % spec.validate_every == 0:
            figures["validation_kl_nats"] = tuner.validate()
        store.advance(tuner, figures.get("validation_kl_nats"))
        log.write(done, **figures)
        if last or done % spec.save_every == 0:
            store.save(tuner)
        listener(Progress(task="tune", done=done, total=tuner.steps, figures=figures))


def _accelerator(spec: TuneSpec, logs: Path) -> Accelerator:
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError('tune.device="cuda": no CUDA device here; use "auto" or "cpu"')
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of an earlier tuning otherwise
    return Accelerator(
        cpu=spec.device == "cpu",
        mixed_precision="bf16" if spec.precision == "bf16" else "no",
        log_with="tensorboard",
        project_dir=logs,
    )


def _write_checkpoint(start: Checkpoint, tuner: Tuner, store: StateStore, data: PreparedData, out: Path) -> Checkpoint:
    """The best parameters, with the digests of the codes that they give and what the model says with them."""
    manifest = start.manifest
    digests = {}
    with torch.no_grad():
        for name, quantizer in tuner.quantizers.items():
            for key, parameter in quantizer.named_parameters():
                parameter.copy_(torch.from_numpy(store.best[f"{name}.{key}"]))
            digests[name] = quantizer.quantize(tuner.bases[name]).digest()
    with atomic_folder(out) as folder:
        write_tensors(store.best, folder / "adapters.safetensors")
        write_tensors(tuner.reference(data.tokens("test")), folder / "reference.safetensors")
        if manifest.changed:
            write_tensors(dict(start.weights), folder / "weights.safetensors")
        write_record(
            manifest.model_copy(
                update={
                    "digests": digests,
                    "steps": store.state.best_step,
                    "validation_kl_nats": store.state.best_kl_nats if math.isfinite(store.state.best_kl_nats) else None,
                    "versions": stack_versions(),
                }
            ),
            folder / "checkpoint.json",
        )
    return Checkpoint(out)
