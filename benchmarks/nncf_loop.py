"""The documented way to tune: NNCF's modules in the order of work, and with the defaults, of its distillation example.

Every microbatch fake-quantizes all weights, makes logits of the whole batch twice, and goes back through the
quantizers; the teacher's hidden states of all sequences are in memory; the learning rate is constant. This is our own
writing of what NNCF's documentation describes (https://github.com/openvinotoolkit/nncf,
examples/llm_compression/torch/distillation_qat_with_lora), not its code, with two additions: it stops when its time is
up, and it can begin from a starting point of ours.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nncf
import torch
from nncf.torch.function_hook.wrapper import get_hook_storage
from nncf.torch.quantization.layers import AsymmetricLoraQuantizer, SymmetricLoraQuantizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from ovexport.artifacts import Checkpoint
from ovexport.models.architecture import parameter_of_hook

LEARNING_RATE = 1e-4
QuantizerTypes = (AsymmetricLoraQuantizer, SymmetricLoraQuantizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What both sides of a comparison share, and the example's defaults.

    Attributes:
        dtype: of the model; the example tunes in bfloat16.
        batch_size, microbatch_size: sequences.
    """

    group_size: int
    rank: int
    mode: str = "int4_asym"
    batch_size: int = 32
    microbatch_size: int = 2
    learning_rate: float = LEARNING_RATE
    dtype: torch.dtype = torch.bfloat16


class NncfLoop:
    """A model compressed in the FQ_LORA format, and what teaches it."""

    def __init__(
        self,
        model: Path,
        tokens: Tensor,
        validation: Tensor,
        settings: Settings,
        seed: int = 0,
        start: Checkpoint | None = None,
    ) -> None:
        """Compress the model and let the uncompressed one read the text.

        Args:
            tokens, validation: (sequences, length).
            start: gives the weights and ranges to begin from, in place of rounding to nearest; weights are rounded to
                the settings' dtype.
        """
        if len(tokens) < settings.batch_size:
            raise ValueError(f"{len(tokens)} sequences are no batch of {settings.batch_size}")
        torch.manual_seed(seed)
        self._settings = settings
        self._tokens = tokens
        self._validation = validation
        network = AutoModelForCausalLM.from_pretrained(model, dtype=settings.dtype).eval().to(tokens.device)
        with torch.no_grad():
            self._taught = [network.model(**_inputs(row[None])).last_hidden_state for row in tokens]
            self._expected = [network.model(**_inputs(row[None])).last_hidden_state for row in validation]
        self._starts_elsewhere = start is not None
        if start is not None:
            _load_weights(network, start)
        self.network = nncf.compress_weights(
            network,
            mode=nncf.CompressWeightsMode(settings.mode),
            group_size=settings.group_size,
            dataset=nncf.Dataset([_inputs(tokens[:1])]),
            compression_format=nncf.CompressionFormat.FQ_LORA,
            advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=settings.rank),
        )
        if start is not None:
            _load_ranges(self.network, start)
        self._optimizer = self._made_optimizer()
        self._loss(tokens[:1], self._taught[0]).backward()  # compiles NNCF's extension, in no one's time
        self._optimizer.zero_grad()

    def _made_optimizer(self) -> torch.optim.AdamW:
        rate = self._settings.learning_rate
        adapters: list[nn.Parameter] = []
        scales: list[nn.Parameter] = []
        self.network.requires_grad_(False)
        for _, module in get_hook_storage(self.network).named_hooks():
            if isinstance(module, QuantizerTypes) and module.num_bits == 4:
                module.enable_gradients()
                own = module.get_adapters()
                adapters += own.values()
                scales += [value for name, value in module.get_trainable_params().items() if name not in own]
        self.network.train()
        groups = [{"params": adapters, "lr": rate}, {"params": scales, "lr": rate / 10}]
        return torch.optim.AdamW(groups, weight_decay=rate)

    def steps(self) -> Iterator[float]:
        """Optimizer steps without end; the mean loss per token of each, in nats."""
        while True:
            order = torch.randperm(len(self._tokens))
            whole = len(order) - len(order) % self._settings.batch_size
            for batch in order[:whole].split(self._settings.batch_size):
                yield self._step(batch)

    def tune_for(self, seconds: float, after_epoch: Callable[[], None]) -> float:
        """As many steps as the time allows; `after_epoch` is called after each pass over the text, in no one's time.

        Returns:
            The seconds that the steps took.
        """
        per_epoch = max(1, len(self._tokens) // self._settings.batch_size)
        used, taken = 0.0, 0
        steps = self.steps()
        while used < seconds:
            started = time.perf_counter()
            next(steps)
            used += time.perf_counter() - started
            taken += 1
            if taken % per_epoch == 0:
                after_epoch()
        after_epoch()
        return used

    def _step(self, batch: Tensor) -> float:
        count = self._settings.batch_size // self._settings.microbatch_size
        total = 0.0
        for indices in batch.split(self._settings.microbatch_size):
            loss = self._loss(self._tokens[indices], torch.cat([self._taught[index] for index in indices]))
            (loss / count).backward()
            total += loss.item() / count
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total

    def _loss(self, ids: Tensor, taught: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self.network.lm_head(taught)
        outputs = self.network(**_inputs(ids)).logits
        vocabulary = outputs.shape[-1]
        return functional.kl_div(
            functional.log_softmax(outputs.view(-1, vocabulary), dim=-1),
            functional.log_softmax(targets.view(-1, vocabulary), dim=-1),
            log_target=True,
            reduction="batchmean",
        )

    @torch.no_grad()
    def validate(self) -> float:
        """Mean divergence per token on the validation sequences, in nats."""
        losses = [self._loss(row[None], taught) for row, taught in zip(self._validation, self._expected, strict=True)]
        return float(torch.stack(losses).double().mean())

    def save(self, path: Path) -> None:
        """The checkpoint that the example writes, with the weights where they are not the base model's."""
        state = {
            "nncf_state_dict": get_hook_storage(self.network).state_dict(),
            "nncf_config": nncf.torch.get_config(self.network),
        }
        if self._starts_elsewhere:
            state["model_state"] = self.network.state_dict()
        torch.save(state, path)


@torch.no_grad()
def _load_weights(network: nn.Module, start: Checkpoint) -> None:
    """The weights that the starting point changed, in the network's type."""
    for name in start.manifest.replaced_weights:
        network.get_parameter(name).copy_(torch.from_numpy(start.weights.require(name)))


@torch.no_grad()
def _load_ranges(network: nn.Module, start: Checkpoint) -> None:
    """The starting point's ranges of every 4-bit layer."""
    ranges = start.adapters
    for hook, module in get_hook_storage(network).named_hooks():
        if isinstance(module, QuantizerTypes) and module.num_bits == 4:
            layer = parameter_of_hook(hook)
            own = module.get_adapters()
            for name, parameter in module.get_trainable_params().items():
                if name not in own:
                    given = torch.from_numpy(ranges.require(f"{layer}.{name}"))
                    parameter.copy_(given.reshape(parameter.shape))


def _inputs(ids: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": mask.cumsum(1) - 1}
