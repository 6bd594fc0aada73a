"""A decoder's blocks, one at a time: what each is called with, what its layers read, what it gives.

What goes through a model block by block needs one block's activations at a time, not the whole model's:

    for block in walk_blocks(network, tokens):
        for names in block.layers_by_input(parameter for parameter in parameters if block.holds(parameter)):
            for read in block.inputs_of(names[0]):
                ...                                        # what the layers `names` read of a batch
        targets = [block.run(states) for states in block.inputs]
        ...                                                # change the block's weights; the next ones see them changed
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ovexport.errors import UnsupportedModelError

_LARGEST_BATCH = 16
_STATES = "hidden_states"


class _Reached(Exception):
    """A forward pass got as far as it has to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A decoder block, with the arguments that the decoder calls it with.

    Attributes:
        name: of the block in the model, such as "model.layers.0"; the names of its parameters begin with it.
        module: the block itself.
        inputs: the hidden states that it reads, a batch each, (sequences, length, hidden size).
        arguments, keywords: what it is called with beside them, such as masks and positions; the same for every batch.
    """

    name: str
    module: nn.Module
    inputs: list[Tensor]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def holds(self, parameter: str) -> bool:
        """Whether a parameter of the model, by its name, is the block's."""
        return parameter.startswith(f"{self.name}.")

    def run(self, states: Tensor) -> Tensor:
        """What the block makes of hidden states, with the weights that it has now.

        Gradients are recorded unless the caller turns them off.

        Args:
            states: one of `inputs`, or others of its shape, (sequences, length, hidden size).

        Returns:
            The hidden states that the next block reads, of the same shape.
        """
        output = self.module(states, *self.arguments, **self.keywords)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def layers_by_input(self, parameters: Iterable[str]) -> list[tuple[str, ...]]:
        """Layers in the order in which they run, those together that read the very same tensor, as the projections to
        queries, keys and values do. A layer that does not run is left out.

        Args:
            parameters: names of the layers' weights, such as "model.layers.0.mlp.down_proj.weight".
        """
        groups: dict[int, list[str]] = {}
        kept: list[Tensor] = []  # so that no two have one id

        def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
                kept.append(arguments[0])
                groups.setdefault(id(arguments[0]), []).append(name)

            return hook

        handles = [self._layer(name).register_forward_pre_hook(note(name)) for name in parameters]
        with _hooked(handles), torch.no_grad():
            self.run(self.inputs[0])
        return [tuple(names) for names in groups.values()]

    def inputs_of(self, parameter: str) -> Iterator[Tensor]:
        """What a layer reads of each batch, (sequences, length, input) for a Linear; the block is run as far as there.

        Args:
            parameter: name of the layer's weight.

        Raises:
            ValueError: the layer does not run.
        """
        read: list[Tensor] = []

        def catch(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            read.append(arguments[0])
            raise _Reached

        for states in self.inputs:
            handles = [self._layer(parameter).register_forward_pre_hook(catch)]
            with _hooked(handles), torch.no_grad(), suppress(_Reached):
                self.run(states)
            if not read:
                raise ValueError(f"{parameter}: its layer does not run")
            yield read.pop()

    def _layer(self, parameter: str) -> nn.Module:
        return self.module.get_submodule(parameter.removeprefix(f"{self.name}.").rpartition(".")[0])


def decoder_blocks(network: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder's blocks by name, in their order: of the model's lists of modules, the one with the most weights.

    Raises:
        UnsupportedModelError: the model has no list of modules.
    """
    lists = {name: module for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise UnsupportedModelError(
            f"{network.config.model_type}: has no list of decoder blocks; set compress.gptq = false and "
            "tune.gradient_checkpointing = false, which go through them"
        )
    path = max(lists, key=lambda name: sum(value.numel() for value in lists[name].parameters()))
    return {f"{path}.{index}": block for index, block in enumerate(lists[path])}


def walk_blocks(network: PreTrainedModel, tokens: Tensor) -> Iterator[Block]:
    """The decoder's blocks in their order, each with the hidden states that the blocks before it give.

    A block's output is computed when the next block is asked for, with the weights that it has by then. Whoever changes
    a block's weights in between lets all later blocks read what the changed one gives; whoever leaves them walks
    through the model as it is. Hidden states of one block are in memory at a time.

    Args:
        tokens: token ids, (sequences, length) int64, at least one sequence. They are read in batches of equal size.

    Raises:
        UnsupportedModelError: the model has no list of decoder blocks.
    """
    modules = decoder_blocks(network)
    size = max(size for size in range(1, _LARGEST_BATCH + 1) if len(tokens) % size == 0)
    batches = torch.split(tokens, size)
    with torch.no_grad():
        calls = _calls(network, modules.values(), batches[0])
        states = list(_first_inputs(network, next(iter(modules.values())), batches))
    block: Block | None = None
    for (name, module), (arguments, keywords) in zip(modules.items(), calls, strict=True):
        if block is not None:
            with torch.no_grad():
                for index, batch in enumerate(states):
                    states[index] = block.run(batch)
        block = Block(name=name, module=module, inputs=states, arguments=arguments, keywords=keywords)
        yield block


def _calls(
    network: PreTrainedModel, blocks: Iterable[nn.Module], batch: Tensor
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each block is called with beside the hidden states: positional arguments and keywords."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append((arguments[1:], {name: value for name, value in keywords.items() if name != _STATES}))

    with _hooked([block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]):
        network.base_model(input_ids=batch, use_cache=False)
    return calls


def _first_inputs(network: PreTrainedModel, first: nn.Module, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The hidden states that the first block reads of each batch."""
    read: list[Tensor] = []

    def catch(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        read.append(arguments[0] if arguments else keywords[_STATES])
        raise _Reached

    with _hooked([first.register_forward_pre_hook(catch, with_kwargs=True)]):
        for batch in batches:
            with suppress(_Reached):
                network.base_model(input_ids=batch, use_cache=False)
            yield read.pop()


@contextmanager
def _hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of a with statement, however it ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
