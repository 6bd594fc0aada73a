"""Stage tune: adapters and quantization ranges learn the distribution of the uncompressed model (distillation).

The student is the plain model with its weights set to de-quantized values. Weights change only at an optimizer step,
so each matrix is quantized once a step; its gradient is summed over the microbatches and sent through the quantizer
once, one layer at a time.
"""

import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ovexport.artifacts import Checkpoint, PreparedData, Record, atomic_folder, read_record, write_record
from ovexport.errors import RecipeError, TuningDivergedError
from ovexport.model import load_model, matrix
from ovexport.progress import Listener, Progress, silent
from ovexport.quantization import FakeQuantizer, load_quantizer
from ovexport.recipe import ModelSpec, TuneSpec
from ovexport.tensorfile import TensorFile, write_tensors
from ovexport.versions import stack_versions

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
    store = _StateStore(out.with_name("tuning"), identity)
    with _Log(logs / "tuning.jsonl", accelerator) as log:
        try:
            _run(tuner, store, log, spec, listener)
        except TuningDivergedError:
            _write_checkpoint(start, tuner, store, out)
            raise
    checkpoint = _write_checkpoint(start, tuner, store, out)
    store.clear()
    return checkpoint


class Tuner:
    """Teacher, student and the quantizers between them.

    Attributes:
        steps: optimizer steps in all; 0 where no layer has an adapter.
        parameters: every trained tensor by "LAYER.PARAMETER".
    """

    def __init__(
        self, start: Checkpoint, model: ModelSpec, spec: TuneSpec, data: PreparedData, accelerator: Accelerator
    ) -> None:
        manifest = start.manifest
        self.spec = spec
        self.accelerator = accelerator
        self.device = accelerator.device
        self.teacher = load_model(model, dtype=torch.float32).to(self.device)
        self.student = load_model(model, dtype=torch.float32).to(self.device)
        self.train = torch.from_numpy(data.tokens("train").astype(np.int64))
        self.validation = torch.from_numpy(data.tokens("validation").astype(np.int64))
        per_step = spec.batch_size * spec.gradient_accumulation_steps
        epochs = math.ceil((spec.epochs or 1) * len(self.train) / per_step)
        tunable = any(layer.rank for layer in manifest.layers)
        self.steps = 0 if not tunable else epochs if spec.steps is None else spec.steps

        changed = start.weights if manifest.changed else {}
        adapters = start.adapters
        self.quantizers: dict[str, FakeQuantizer] = {}
        self.bases: dict[str, Tensor] = {}
        self.targets: dict[str, nn.Parameter] = {}
        for layer in manifest.layers:
            target = self.student.get_parameter(layer.name)
            base = matrix(self.teacher, layer.name, transposed=layer.transposed)
            if layer.name in changed:
                base = torch.from_numpy(np.array(changed[layer.name])).to(self.device)
            view = target.data.T if layer.transposed else target.data
            if layer.mode == "float":
                view.copy_(base)
                continue
            quantizer = load_quantizer(layer, adapters).to(self.device)
            self.quantizers[layer.name], self.bases[layer.name] = quantizer, base
            self.targets[layer.name] = target
            target.requires_grad_(layer.rank > 0)
        self.parameters = {
            f"{name}.{key}": parameter
            for name, quantizer in self.quantizers.items()
            for key, parameter in quantizer.named_parameters()
        }
        self.optimizer = self._optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._learning_rate_factor)
        self.quantize_weights()

    def _optimizer(self) -> torch.optim.Optimizer:
        adapters = [value for key, value in self.parameters.items() if ".lora_" in key]
        ranges = [value for key, value in self.parameters.items() if ".lora_" not in key and value.requires_grad]
        scale_rate = self.spec.scale_learning_rate
        return torch.optim.AdamW(
            [
                {"params": adapters, "lr": self.spec.learning_rate, "weight_decay": self.spec.weight_decay},
                {
                    "params": ranges,
                    "lr": self.spec.learning_rate / 10 if scale_rate is None else scale_rate,
                    "weight_decay": 0.0,
                },
            ]
        )

    def _learning_rate_factor(self, step: int) -> float:
        warmup = round(self.spec.warmup_fraction * self.steps)
        if step < warmup:
            return (step + 1) / warmup
        left = max(0.0, (self.steps - step) / max(1, self.steps - warmup))
        return {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[self.spec.schedule]

    @torch.no_grad()
    def quantize_weights(self) -> None:
        """Set the student's weights to the de-quantized values of the present parameters."""
        for name, quantizer in self.quantizers.items():
            target = self.targets[name].data
            view = target.T if quantizer.layer.transposed else target
            view.copy_(quantizer(self.bases[name]))

    def step(self, index: int) -> tuple[float, float]:
        """One optimizer step.

        Returns:
            The mean KL divergence per token in nats over the step's microbatches, and the norm of the gradient.

        Raises:
            TuningDivergedError: either is not finite; the parameters are those before the step.
        """
        total = 0.0
        count = self.spec.gradient_accumulation_steps
        for batch in itertools.islice(self._microbatches(index), count):
            loss = self._divergence(batch)
            self.accelerator.backward(loss / count)
            total += loss.item() / count
        self._backward_through_quantizers()
        trained = [parameter for parameter in self.parameters.values() if parameter.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(trained, self.spec.max_gradient_norm))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise TuningDivergedError(
                f"tune: loss {total} and gradient norm {norm} at step {index + 1}; the best checkpoint so far is kept, "
                f"lower tune.learning_rate={self.spec.learning_rate}"
            )
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.quantize_weights()
        return total, norm

    @torch.no_grad()
    def validate(self) -> float:
        """Mean KL divergence per token from the teacher on the validation sequences, in nats."""
        parts = torch.split(self.validation, self.spec.batch_size)
        losses = [float(self._divergence(part)) * len(part) for part in parts]
        return sum(losses) / len(self.validation)

    def _divergence(self, batch: Tensor) -> Tensor:
        ids = batch.to(self.device)
        with self.accelerator.autocast():
            with torch.no_grad():
                teacher = _logits(self.teacher, ids)
            student = _logits(self.student, ids)
        return (
            nn.functional.kl_div(
                student.float().log_softmax(-1), teacher.float().log_softmax(-1), log_target=True, reduction="sum"
            )
            / ids.numel()
        )

    def _backward_through_quantizers(self) -> None:
        for name, quantizer in self.quantizers.items():
            gradient = self.targets[name].grad
            if gradient is None:
                continue
            self.targets[name].grad = None
            quantizer(self.bases[name]).backward(gradient.T if quantizer.layer.transposed else gradient)

    def _microbatches(self, step: int) -> Iterator[Tensor]:
        """The step's microbatches; the order of the sequences follows from the seed alone."""
        size = self.spec.batch_size
        first = step * self.spec.gradient_accumulation_steps * size
        for begin in itertools.count(first, size):
            yield self.train[[self._sequence_at(position) for position in range(begin, begin + size)]]

    def _sequence_at(self, position: int) -> int:
        epoch, index = divmod(position, len(self.train))
        return int(np.random.default_rng((self.spec.seed, epoch)).permutation(len(self.train))[index])

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Parameters and the optimizer's moments, by name."""
        tensors = {}
        for key, parameter in self.parameters.items():
            tensors[key] = parameter.detach().cpu().numpy().copy()
            for moment in ("exp_avg", "exp_avg_sq"):
                value = self.optimizer.state.get(parameter, {}).get(moment)
                if value is not None:
                    tensors[f"{moment}/{key}"] = value.cpu().numpy().copy()
        return tensors

    @torch.no_grad()
    def restore(self, tensors: TensorFile, step: int) -> None:
        """Go on from a state saved after `step` steps."""
        for key, parameter in self.parameters.items():
            parameter.copy_(torch.from_numpy(np.array(tensors.require(key))))
            if f"exp_avg/{key}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    **{
                        moment: torch.from_numpy(np.array(tensors[f"{moment}/{key}"])).to(self.device)
                        for moment in ("exp_avg", "exp_avg_sq")
                    },
                }
        for group, base_rate in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base_rate * self._learning_rate_factor(step)
        self.scheduler.last_epoch = step
        self.quantize_weights()


def _run(tuner: Tuner, store: "_StateStore", log: "_Log", spec: TuneSpec, listener: Listener) -> None:
    state = store.load(tuner)
    if state is None:
        kl = tuner.validate()
        state = TunerState(identity=store.identity, step=0, best_step=0, best_kl_nats=kl)
        store.save_best(tuner)
        log.write(0, validation_kl_nats=kl)
    else:
        logger.info("tuning goes on after step %d of %d", state.step, tuner.steps)
    log.forget_after(state.step)
    tokens = spec.batch_size * spec.gradient_accumulation_steps * tuner.train.shape[1]
    for index in range(state.step, tuner.steps):
        started = time.monotonic()
        rate = tuner.optimizer.param_groups[0]["lr"]
        loss, norm = tuner.step(index)
        done = index + 1
        figures = {
            "loss_kl_nats": loss,
            "gradient_norm": norm,
            "learning_rate": rate,
            "tokens_per_s": tokens / (time.monotonic() - started),
        }
        last = done == tuner.steps
        if last or done % spec.validate_every == 0:
            kl = figures["validation_kl_nats"] = tuner.validate()
            if kl < state.best_kl_nats:
                state = state.model_copy(update={"best_step": done, "best_kl_nats": kl})
                store.save_best(tuner)
        state = state.model_copy(update={"step": done})
        log.write(done, **figures)
        if last or done % spec.save_every == 0:
            store.save(tuner, state)
        listener(Progress(task="tune", done=done, total=tuner.steps, figures=figures))
    store.state = state


class _StateStore:
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


class _Log:
    """A JSON line per step, and the same figures for TensorBoard."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._accelerator = accelerator

    def __enter__(self) -> "_Log":
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


def _logits(network: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = network(input_ids=ids, use_cache=False).logits
    return logits


def _write_checkpoint(start: Checkpoint, tuner: Tuner, store: _StateStore, out: Path) -> Checkpoint:
    """The best parameters, with the digests of the codes that they give."""
    manifest = start.manifest
    digests = {}
    with torch.no_grad():
        for name, quantizer in tuner.quantizers.items():
            for key, parameter in quantizer.named_parameters():
                parameter.copy_(torch.from_numpy(store.best[f"{name}.{key}"]))
            digests[name] = quantizer.quantize(tuner.bases[name]).digest()
    with atomic_folder(out) as folder:
        write_tensors(store.best, folder / "adapters.safetensors")
        if manifest.changed:
            write_tensors(dict(start.weights), folder / "weights.safetensors")
        write_record(
            manifest.model_copy(
                update={
                    "digests": digests,
                    "steps": store.state.best_step if store.state else 0,
                    "validation_kl_nats": store.state.best_kl_nats if store.state else None,
                    "versions": stack_versions(),
                }
            ),
            folder / "checkpoint.json",
        )
    return Checkpoint(out)
