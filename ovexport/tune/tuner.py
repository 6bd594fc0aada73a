"""Teacher, student and one optimizer step.

The student is the plain model with its weights set to de-quantized values. Weights change only at an optimizer step,
so each matrix is quantized once a step; its gradient is summed over the microbatches and sent through the quantizer
once, one layer at a time.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ovexport.artifacts import Checkpoint, PreparedData
from ovexport.errors import TuningDivergedError
from ovexport.model import load_model, matrix
from ovexport.quantization import FakeQuantizer, load_quantizer
from ovexport.recipe import ModelSpec, TuneSpec
from ovexport.tensorfile import TensorFile

_REFERENCE_ELEMENTS = 2**22
_REFERENCE_LENGTH = 64
_FEWEST_POSITIONS = 32


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

    @torch.no_grad()
    def reference(self, tokens: NDArray[np.int32]) -> dict[str, NDArray[np.generic]]:
        """What the student, as its parameters are now, says of the first tokens: `token_ids` (sequences, length) int32
        and `logits` (sequences, length, vocabulary), computed in float32 whatever the precision of the tuning."""
        self.quantize_weights()
        positions = max(_FEWEST_POSITIONS, _REFERENCE_ELEMENTS // self.student.config.get_text_config().vocab_size)
        length = min(tokens.shape[1], positions, _REFERENCE_LENGTH)
        sample = tokens[: positions // length, :length]
        ids = torch.from_numpy(sample.astype(np.int64)).to(self.device)
        logits = [_logits(self.student, row[None]).float().cpu().numpy() for row in ids]
        return {"token_ids": sample, "logits": np.concatenate(logits)}

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
        """Go on from a state saved after `step` steps.

        Raises:
            ArtifactError: the state lacks a tensor; nothing was changed.
        """
        values = {key: tensors.require(key) for key in self.parameters}
        for key, parameter in self.parameters.items():
            parameter.copy_(torch.from_numpy(np.array(values[key])))
            if f"exp_avg/{key}" in tensors:
                moments = {name: tensors[f"{name}/{key}"] for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    **{name: torch.from_numpy(np.array(value)).to(self.device) for name, value in moments.items()},
                }
        for group, base_rate in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base_rate * self._learning_rate_factor(step)
        self.scheduler.last_epoch = step
        self.quantize_weights()


def _logits(network: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = network(input_ids=ids, use_cache=False).logits
    return logits
