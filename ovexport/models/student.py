"""The student: the model with its weights set to de-quantized values, and the quantizers that give them.

Weights change only at an optimizer step, so each matrix is quantized once a step; its gradient is summed over the
microbatches and sent through the quantizer once, one layer at a time.
"""

import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ovexport.artifacts import Checkpoint
from ovexport.models.architecture import Architecture
from ovexport.models.head import Head
from ovexport.models.loading import load_model
from ovexport.models.matrix_view import MatrixView, matrix_view
from ovexport.recipe import ModelSpec
from ovexport.weights.adapters import load_quantizer
from ovexport.weights.layer import LayerFormat
from ovexport.weights.quantizer import Quantizer, TunableQuantizer


class Student:
    """A model whose weights are those of a checkpoint.

    Attributes:
        network: the model that was given; its weights are the student's from here on.
        quantizers: by layer.
        base_weights: what the adapters are added to, by layer, (output, input), in the type of the base model.
        trained: every parameter that is tuned, by "LAYER.PARAMETER"; a norm by its own name.
        norms: weights and biases of normalization layers that are tuned, float32, by name.
    """

    def __init__(
        self,
        network: PreTrainedModel,
        start: Checkpoint,
        own_weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        *,
        fixed: Collection[str] = (),
        norms: Collection[str] = (),
    ) -> None:
        """Make a student of a model.

        Args:
            own_weights: the model's by layer, (output, input).
            dtype: of the products of matrices.
            fixed: names of quantizers' parameters that are not tuned.
            norms: names of the norms that are tuned beside those that the checkpoint holds already.
        """
        self.network = network
        self.quantizers: dict[str, TunableQuantizer] = {}
        self.base_weights: dict[str, Tensor] = {}
        self._floats: dict[str, Tensor] = {}
        self._views: dict[str, MatrixView] = {}
        self._sums: dict[str, Tensor] = {}
        adapters = start.adapters
        for layer, base in base_weights(start, own_weights):
            view = matrix_view(network, layer.name)
            view.parameter.data = torch.empty_like(view.parameter.data, dtype=dtype)
            if layer.encoding is None:
                self._floats[layer.name] = base
                view.write(base)
                continue
            quantizer = self.quantizers[layer.name] = load_quantizer(layer, adapters).to(base.device)
            for name in set(fixed) & set(quantizer.range_names):
                getattr(quantizer, name).requires_grad_(False)
            self.base_weights[layer.name] = base
            self._views[layer.name] = view
            if layer.rank:
                self._sum_gradients(layer.name, view.parameter)
        self.norms = _float32_parameters(network, {*norms, *(norm.name for norm in start.manifest.norms)})
        self._base_norms = {name: value.detach().clone() for name, value in self.norms.items()}
        self._load_norms(adapters)
        self.trained = _trained_parameters(self.quantizers) | self.norms
        self.quantize_weights()

    @property
    def head(self) -> Head:
        """The head with the weights that ship."""
        return Architecture(self.network).head()

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return torch.device(self.network.device)

    @property
    def trains_what_ships(self) -> bool:
        """Whether a training step sees the very weights that ship."""
        return all(quantizer.trains_what_ships for quantizer in self.quantizers.values())

    @torch.no_grad()
    def quantize_weights(self) -> None:
        """Set the weights to those that a training step sees of the present parameters."""
        for name, quantizer in self.quantizers.items():
            quantizer.train_into(self.base_weights[name], self._views[name].read())

    @torch.no_grad()
    def settle_weights(self) -> None:
        """Set the weights to those that ship of the present parameters."""
        for name, quantizer in self.quantizers.items():
            quantizer.dequantize_into(self.base_weights[name], self._views[name].read())

    def activate(self, ranks: Mapping[str, int]) -> None:
        """Use so many of the adapters' ranks, by layer; the weights follow with `quantize_weights`."""
        for name, rank in ranks.items():
            self.quantizers[name].active_rank = rank

    def use_ranks(self, ranks: Mapping[str, int]) -> None:
        """Set the weights to those that ship with so many of the adapters' ranks, by layer."""
        self.activate(ranks)
        self.settle_weights()

    def backward_through_quantizers(self) -> None:
        """Turn the gradients of the weights, summed since the last call, into gradients of the parameters."""
        for name, quantizer in self.quantizers.items():
            gradient = self._sums.pop(name, None)
            if gradient is None:
                continue
            gradients = quantizer.gradients(self.base_weights[name], self._views[name].oriented(gradient))
            for key, parameter in quantizer.named_parameters():
                if parameter.requires_grad:  # with dropout, the layer's output has given it a part of the gradient
                    parameter.grad = gradients[key] if parameter.grad is None else gradients[key] + parameter.grad

    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, by "LAYER.PARAMETER"."""
        return stored_parameters(self.quantizers) | {name: value.detach() for name, value in self.norms.items()}

    @torch.no_grad()
    def load_parameters(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Take over what `stored` gives; the weights follow with `quantize_weights`. Norms that are not given are the
        base model's."""
        for name, quantizer in self.quantizers.items():
            names = quantizer.stored()
            quantizer.load({key: torch.from_numpy(np.array(values[f"{name}.{key}"])) for key in names})
        self._load_norms(values)

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Set parameters that are trained; the weights follow with `quantize_weights`."""
        for key, value in values.items():
            self.trained[key].copy_(value)

    def drop_adapter_inputs(self, share: float) -> None:
        """Keep a share of the inputs from the adapters, as dropout does, wherever gradients are computed.

        The weights hold the whole adapter, so what it adds for the inputs with dropout less those without is added to
        the layer's output.
        """

        def add(quantizer: TunableQuantizer, inputs: Tensor, output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            kept = nn.functional.dropout(inputs, share)
            return output + quantizer.adapter_output((kept - inputs).float()).to(output.dtype)

        for name, quantizer in self.quantizers.items():
            if quantizer.layer.rank:
                module = self.network.get_submodule(name.rpartition(".")[0])
                module.register_forward_hook(lambda _, inputs, output, own=quantizer: add(own, inputs[0], output))

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass rather than keep them.

        transformers does so for blocks in training mode only, which may drop out at random: that is turned off.
        """
        self.network.gradient_checkpointing_enable({"use_reentrant": False})
        _drop_nothing(self.network.config)
        for block in Architecture(self.network).blocks().values():
            if isinstance(block, GradientCheckpointingLayer):
                _drop_nothing(block)
                block.training = True  # of the block alone: what is inside stays in evaluation mode

    def drop_gradients(self) -> None:
        """Forget the gradients since the last step."""
        self._sums.clear()
        for parameter in self.trained.values():
            parameter.grad = None

    def in_float32(self) -> None:
        """Let the network compute in float32 from here on."""
        self.network.float().eval()
        for name, weight in self._floats.items():
            matrix_view(self.network, name).write(weight)
        self.settle_weights()

    @torch.no_grad()
    def _load_norms(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        for name, base in self._base_norms.items():
            self.norms[name].copy_(torch.from_numpy(np.array(values[name])) if name in values else base)

    def _sum_gradients(self, name: str, parameter: nn.Parameter) -> None:
        """Let a weight's gradients be summed over the microbatches in float32, whatever type they come in."""

        def add(weight: Tensor) -> None:
            gradient, weight.grad = weight.grad, None
            assert gradient is not None
            if name in self._sums:
                self._sums[name] += gradient
            else:
                self._sums[name] = gradient.float()

        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]


def stored_parameters(quantizers: Mapping[str, Quantizer]) -> dict[str, Tensor]:
    """What a checkpoint holds of a model's quantizers, by "LAYER.PARAMETER"."""
    stored = {name: quantizer.stored() for name, quantizer in quantizers.items()}
    return {f"{name}.{key}": value for name, values in stored.items() for key, value in values.items()}


def _float32_parameters(network: PreTrainedModel, names: Collection[str]) -> dict[str, nn.Parameter]:
    """Parameters of a model that are tuned as they are, in its order, made float32."""
    parameters = {name: value for name, value in network.named_parameters() if name in names}
    for value in parameters.values():
        value.data = value.data.float()
        value.requires_grad_(True)
    return parameters


def _trained_parameters(quantizers: Mapping[str, TunableQuantizer]) -> dict[str, nn.Parameter]:
    parameters = {name: quantizer.named_parameters() for name, quantizer in quantizers.items()}
    pairs = ((f"{name}.{key}", value) for name, values in parameters.items() for key, value in values)
    return {key: value for key, value in pairs if value.requires_grad}


def base_weights(start: Checkpoint, own_weights: Mapping[str, Tensor]) -> Iterator[tuple[LayerFormat, Tensor]]:
    """Each layer with the weight that its adapters or codes are made from: the replaced one, else the model's own."""
    manifest = start.manifest
    replaced = start.weights if manifest.replaced_weights else {}
    for layer in manifest.layers:
        own = own_weights[layer.name]
        yield layer, _mapped(replaced[layer.name]).to(own.device) if layer.name in replaced else own


def _drop_nothing(holder: object) -> None:
    """Set every rate of dropout that an object has to 0."""
    for name, value in vars(holder).items():
        if "drop" in name and isinstance(value, float):
            setattr(holder, name, 0.0)


def _mapped(values: NDArray[np.float32]) -> Tensor:
    """A tensor that lies in its file, not in memory; nobody writes to it, which torch can't know and warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(values)


class TunedModel:
    """A checkpoint's model in torch, in float32, as lm-evaluation-harness asks it (see ovexport.tasks.asked).

    Args:
        ranks: of its adapters by layer, where these are not to have the checkpoint's.
    """

    def __init__(self, checkpoint: Checkpoint, model: ModelSpec, ranks: Mapping[str, int] | None = None) -> None:
        network = load_model(model)
        own_weights = {layer.name: matrix_view(network, layer.name).read() for layer in checkpoint.manifest.layers}
        student = Student(network, checkpoint, own_weights, torch.float32)
        student.activate(ranks or {})
        student.in_float32()
        self._network = network
        self._past: Any = None

    @torch.no_grad()
    def begin(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """As CausalLM."""
        self._past = None
        return self.extend(tokens)

    @torch.no_grad()
    def extend(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """As CausalLM."""
        if self._past is not None and len(tokens) > 1:
            self._past.batch_repeat_interleave(len(tokens))
        output = self._network(input_ids=torch.from_numpy(tokens), past_key_values=self._past, use_cache=True)
        self._past = output.past_key_values
        return np.asarray(output.logits.float().numpy())
