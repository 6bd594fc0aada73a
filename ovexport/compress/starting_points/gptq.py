"""GPTQ's rounding as a starting point: the weights are changed so that plain rounding gives its codes.

Frantar et al., arXiv:2210.17323: columns are rounded one after the other, and the error of each is made up for in those
that are still to come, as far as the layer's inputs tell (H = X·Xᵀ over calibration text). Columns with the most
energetic inputs come first, on scales and zero points that are settled before ("act-order" with static groups).

The weights that tuning adds its adapters to lie half way between what a column was when it was rounded and the value
that its code stands for. At the former, many codes flip with the first small change, and what GPTQ had made up for is
lost; at the latter, nothing says which of them would flip at little cost.

Blocks of the decoder are done in their order, each on what the rounded ones before it give.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ovexport.compress.starting_points.starting_point import Start, StartingPoint, starting_points
from ovexport.errors import UnsupportedModelError
from ovexport.models.matrix_view import matrix_view
from ovexport.weights.layer import LayerFormat
from ovexport.weights.quantizer import FakeQuantizer

_DAMPING = 0.01
_SHARE_KEPT = 0.5
_COLUMNS = 64
_LARGEST_BATCH = 16


@dataclass(frozen=True, slots=True)
class _Calls:
    """How the decoder calls its blocks.

    Attributes:
        states: inputs of the block to come, a batch each.
        others: for each block, what it is given beside them: masks and positions, the same for every batch.
    """

    states: list[Tensor]
    others: list[tuple[tuple[Any, ...], dict[str, Any]]]


class _Reached(Exception):
    """A forward pass got as far as it has to."""


@starting_points.register("gptq")
class Gptq(StartingPoint):
    """Weights of the 4-bit layers that plain rounding gives GPTQ's codes for, on the scales that there are."""

    needs_text = True
    replaces_weights = True

    @torch.no_grad()
    def apply(self, start: Start) -> None:
        """As StartingPoint; the 8-bit layers count as they ship.

        Raises:
            UnsupportedModelError: the model has no list of blocks, or inputs that are not finite.
        """
        for layer in start.layers:
            view = matrix_view(start.network, layer.name)
            view.parameter.data = view.parameter.data.float().clone()  # the model's own are read again afterwards
            if layer.name in start.replaced_weights:
                view.write(start.replaced_weights[layer.name])
            if layer.encoding and layer.encoding.bits == 8:
                start.quantizers[layer.name].dequantize_into(view.read().clone(), view.read())
        tuned = [layer for layer in start.layers if layer.encoding and layer.encoding.bits == 4]
        start.replaced_weights |= gptq(start.network.float(), tuned, start.quantizers, start.calibration)


@torch.no_grad()
def gptq(
    network: PreTrainedModel,
    layers: Sequence[LayerFormat],
    quantizers: Mapping[str, FakeQuantizer],
    calibration: Tensor,
) -> dict[str, Tensor]:
    """Weights that round to GPTQ's codes, by layer, (output, input) float32; the quantizers' scales stay.

    Args:
        network: float32; its weights are the de-quantized ones afterwards.
        layers: those to do; the ones outside the decoder's blocks are left as they are.
        calibration: tokens, (sequences, length).

    Raises:
        UnsupportedModelError: the model has no list of blocks, or inputs that are not finite.
    """
    prefix, blocks = _blocks(network)
    calls = _calls(network, blocks, calibration)
    changed: dict[str, Tensor] = {}
    for index, block in enumerate(blocks):
        own = {
            layer.name.removeprefix(f"{prefix}.{index}.").removesuffix(".weight"): layer
            for layer in layers
            if layer.name.startswith(f"{prefix}.{index}.")
        }
        for modules in _in_order(block, own, calls, index):
            inputs = _second_moments(block, modules[0], calls, index)
            for module in modules:
                layer = own[module]
                weight = matrix_view(network, layer.name).read()
                quantizer = quantizers[layer.name]
                changed[layer.name] = rounding_to_gptq(weight, inputs, quantizer, layer.name)
                quantizer.dequantize_into(changed[layer.name], weight)
        for number, states in enumerate(calls.states):
            calls.states[number] = _run(block, states, calls, index)
    return changed


def rounding_to_gptq(weight: Tensor, inputs: Tensor, quantizer: FakeQuantizer, name: str) -> Tensor:
    """The weight whose plain rounding is GPTQ's, (output, input) float32.

    Args:
        weight: (output, input).
        inputs: second moments of the layer's inputs, (input, input) float32.
        name: for the error.

    Raises:
        UnsupportedModelError: the second moments are not finite.
    """
    order = inputs.diagonal().argsort(descending=True)
    factor = _inverse_factor(inputs[order][:, order], name)
    step, zero_point = (value[:, order // quantizer.layer.group_size, 0] for value in quantizer.grid())
    remaining = weight.float()[:, order]
    kept = torch.empty_like(remaining)
    for begin in range(0, len(order), _COLUMNS):
        here = slice(begin, min(begin + _COLUMNS, len(order)))
        block, errors = remaining[:, here].clone(), torch.empty_like(remaining[:, here])
        own = factor[here, here]
        for column in range(block.shape[1]):
            value, scale, zero = block[:, column].clone(), step[:, begin + column], zero_point[:, begin + column]
            code = (torch.round(value / scale) + zero).clamp_(quantizer.level_low, quantizer.level_high)
            rounded = (code - zero) * scale
            kept[:, begin + column] = rounded + _SHARE_KEPT * (value - rounded)
            errors[:, column] = (value - rounded) / own[column, column]
            block[:, column:] -= torch.outer(errors[:, column], own[column, column:])
        remaining[:, here.stop :] -= errors @ factor[here, here.stop :]
    result = torch.empty_like(kept)
    result[:, order] = kept
    return result


def _inverse_factor(moments: Tensor, name: str) -> Tensor:
    """Upper Cholesky factor of the inverse; the diagonal is raised until there is one."""
    identity = torch.eye(len(moments), device=moments.device)
    energy = moments.diagonal().mean()
    if not torch.isfinite(moments).all():
        raise UnsupportedModelError(
            f"{name}: its inputs are not finite on the calibration text; set compress.gptq = false"
        )
    damping = _DAMPING
    while damping <= 1:
        lower, failed = torch.linalg.cholesky_ex(moments + (damping * energy + 1e-12) * identity)
        if not failed:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10
    raise UnsupportedModelError(f"{name}: its inputs hardly vary on the calibration text; set compress.gptq = false")


def _blocks(network: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's list of blocks and its name: the list that holds the most weights."""
    lists = {name: module for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise UnsupportedModelError(f"{network.config.model_type}: has no list of blocks; set compress.gptq = false")
    name = max(lists, key=lambda name: sum(value.numel() for value in lists[name].parameters()))
    return name, lists[name]


def _calls(network: PreTrainedModel, blocks: nn.ModuleList, calibration: Tensor) -> _Calls:
    """What the blocks are called with: the first one's inputs for every batch, and the rest of the arguments."""
    size = max(size for size in range(1, _LARGEST_BATCH + 1) if len(calibration) % size == 0)
    batches = torch.split(calibration, size)
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    states: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others.append((args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}))

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    with _hooked([block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]):
        network.base_model(input_ids=batches[0], use_cache=False)
    with _hooked([blocks[0].register_forward_pre_hook(catch, with_kwargs=True)]):
        for batch in batches:
            try:
                network.base_model(input_ids=batch, use_cache=False)
            except _Reached:
                continue
    return _Calls(states, others)


def _in_order(block: nn.Module, own: Mapping[str, LayerFormat], calls: _Calls, index: int) -> list[tuple[str, ...]]:
    """The block's layers in the order they run in, those that read the very same input together."""
    groups: dict[int, list[str]] = {}
    inputs: list[Tensor] = []  # kept, so that no two have one id

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs.append(args[0])
            groups.setdefault(id(args[0]), []).append(name)

        return hook

    with _hooked([block.get_submodule(name).register_forward_pre_hook(note(name)) for name in own]):
        _run(block, calls.states[0], calls, index)
    return [tuple(names) for names in groups.values()]


def _second_moments(block: nn.Module, name: str, calls: _Calls, index: int) -> Tensor:
    """Mean of x·xᵀ over what a layer reads, (input, input) float32."""
    moments: list[Tensor] = []
    count = 0

    def catch(_module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal count
        rows = args[0].reshape(-1, args[0].shape[-1]).float()
        count += len(rows)
        if moments:
            moments[0].addmm_(rows.T, rows)
        else:
            moments.append(rows.T @ rows)
        raise _Reached

    with _hooked([block.get_submodule(name).register_forward_pre_hook(catch)]):
        for states in calls.states:
            try:
                _run(block, states, calls, index)
            except _Reached:
                continue
    return moments[0] / count


def _run(block: nn.Module, states: Tensor, calls: _Calls, index: int) -> Tensor:
    args, kwargs = calls.others[index]
    output = block(states, *args, **kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


@contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
