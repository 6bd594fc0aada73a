"""A decoder's blocks, one at a time: what each is called with, what its layers read, what it gives.

What goes through a model block by block needs one block's activations at a time, not the whole model's:

    for block in walk_blocks(network, tokens):
        for names in block.layers_by_input(parameter for parameter in parameters if block.holds(parameter)):
            for read in block.inputs_of(names[0]):
                ...                                        # what the layers `names` read of a batch
        targets = [block.run(states) for states in block.inputs]
        ...                                                # change the block's weights; the next ones see them changed
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from mmap import mmap
from tempfile import TemporaryFile, gettempdir
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ovexport.errors import ArtifactError, UnsupportedModelError

_LARGEST_BATCH = 16
_STATES = "hidden_states"
KEPT_BYTES = 2**31


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

    def backward(self, states: Tensor, slope: Tensor) -> Tensor:
        """The gradient at the block's inputs from that at its outputs; hooks of its layers see both passes.

        Args:
            states: one of `inputs`.
            slope: gradient of a loss with respect to what `run` makes of them, of the same shape.
        """
        leaf = states.detach().requires_grad_(True)
        with torch.enable_grad():
            output = self.run(leaf)
        (gradient,) = torch.autograd.grad(output, leaf, slope)
        return gradient

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

        handles = [self.layer(name).register_forward_pre_hook(note(name)) for name in parameters]
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
            handles = [self.layer(parameter).register_forward_pre_hook(catch)]
            with _hooked(handles), torch.no_grad(), suppress(_Reached):
                self.run(states)
            if not read:
                raise ValueError(f"{parameter}: its layer does not run")
            yield read.pop()

    def layer(self, parameter: str) -> nn.Module:
        """The layer that a parameter of the block, by its name in the model, is the weight of."""
        return self.module.get_submodule(parameter.removeprefix(f"{self.name}.").rpartition(".")[0])


def decoder_blocks(network: PreTrainedModel) -> dict[str, nn.Module]:
    """The decoder's blocks by name, in their order: of the model's lists of modules, the one with the most weights.

    Raises:
        UnsupportedModelError: the model has no list of modules.
    """
    lists = {name: module for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise UnsupportedModelError(
            f'{network.config.model_type}: has no list of decoder blocks; set compress.rounding = "nearest", without '
            "a budget, and tune.gradient_checkpointing = false; all else goes through them"
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
    batches = _batches(tokens)
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


def walk_blocks_back(
    network: PreTrainedModel, tokens: Tensor, slope: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Block, list[Tensor]]]:
    """The decoder's blocks from the last to the first, each with the gradients of a loss at its outputs.

    Whoever walks turns the gradients, a batch each, into those at the block's inputs before the next block is asked
    for:

        for block, slopes in walk_blocks_back(network, tokens, slope):
            for index, states in enumerate(block.inputs):
                slopes[index] = block.backward(states, slopes[index])

    The inputs of all blocks are computed first, with the weights that the model has then; beyond 2 GiB they lie in
    temporary files.

    Args:
        tokens: token ids, (sequences, length) int64, at least one sequence. They are read in batches of equal size.
        slope: the gradient of the loss with respect to the last hidden states of a batch, which the head reads.

    Raises:
        ArtifactError: the disk of temporary files is full.
        UnsupportedModelError: the model has no list of decoder blocks.
    """
    modules = decoder_blocks(network)
    batches = _batches(tokens)
    with torch.no_grad():
        calls = _calls(network, modules.values(), batches[0])
    kept = _Kept()
    inputs: list[list[Tensor]] = [[] for _ in modules]
    slopes: list[Tensor] = []
    for batch in batches:
        slopes.append(_read_through(network, list(modules.values()), batch, inputs, slope))
        for states in inputs:
            states[-1] = kept.keep(states[-1])
    for (name, module), (arguments, keywords) in reversed(list(zip(modules.items(), calls, strict=True))):
        block = Block(name=name, module=module, inputs=inputs.pop(), arguments=arguments, keywords=keywords)
        yield block, slopes


def embedding_slopes(network: PreTrainedModel, batch: Tensor, slope: Tensor) -> dict[str, Tensor]:
    """The gradients at the outputs of the embeddings that the first block's inputs come from, by path of the module.

    Args:
        batch: token ids, (sequences, length).
        slope: gradient of a loss at the first block's inputs, (sequences, length, hidden size).
    """
    outputs: dict[str, Tensor] = {}
    read: list[Tensor] = []

    def note(path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(_module: nn.Module, _arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            outputs[path] = output.detach().requires_grad_(True)
            return outputs[path]

        return hook

    def reach(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        read.append(arguments[0] if arguments else keywords[_STATES])
        raise _Reached

    first = next(iter(decoder_blocks(network).values()))
    handles = [first.register_forward_pre_hook(reach, with_kwargs=True)]
    for path, module in network.named_modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(note(path)))
    with _hooked(handles), torch.enable_grad(), suppress(_Reached):
        network.base_model(input_ids=batch, use_cache=False)
    gradients = torch.autograd.grad(read[0], list(outputs.values()), slope, allow_unused=True)
    return {path: found for path, found in zip(outputs, gradients, strict=True) if found is not None}


class _Kept:
    """Hidden states in memory, up to 2 GiB, and the rest in mapped files without a name, of which nothing is left
    however the process ends."""

    def __init__(self) -> None:
        self._bytes = 0

    def keep(self, states: Tensor) -> Tensor:
        """The same values, in memory or in a file.

        Raises:
            ArtifactError: the disk of temporary files is full.
        """
        self._bytes += states.nbytes
        if self._bytes <= KEPT_BYTES or states.device.type != "cpu":
            return states
        with TemporaryFile() as file:
            try:
                os.posix_fallocate(file.fileno(), 0, states.nbytes)  # without it, a full disk is a crash later
            except OSError as error:
                raise ArtifactError(
                    f"{gettempdir()}: no room for hidden states ({error.strerror}); free some, or set TMPDIR to a "
                    "folder on another disk"
                ) from error
            mapped = mmap(file.fileno(), states.nbytes)
        return torch.frombuffer(mapped, dtype=states.dtype).reshape(states.shape).copy_(states)


def _batches(tokens: Tensor) -> tuple[Tensor, ...]:
    size = max(size for size in range(1, _LARGEST_BATCH + 1) if len(tokens) % size == 0)
    return torch.split(tokens, size)


def _read_through(
    network: PreTrainedModel,
    modules: list[nn.Module],
    batch: Tensor,
    inputs: list[list[Tensor]],
    slope: Callable[[Tensor], Tensor],
) -> Tensor:
    """The gradient at the last block's outputs; the hidden states that each block reads are added to `inputs`."""
    last: list[Tensor] = []

    def note(states: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            states.append((arguments[0] if arguments else keywords[_STATES]).detach())

        return hook

    def detach(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        last.append(states.detach().requires_grad_(True))
        return (last[0], *output[1:]) if isinstance(output, tuple) else last[0]

    handles = [
        module.register_forward_pre_hook(note(states), with_kwargs=True)
        for module, states in zip(modules, inputs, strict=True)
    ]
    handles.append(modules[-1].register_forward_hook(detach))
    with _hooked(handles), torch.enable_grad():
        hidden = network.base_model(input_ids=batch, use_cache=False).last_hidden_state
    (gradient,) = torch.autograd.grad(hidden, last[0], slope(hidden.detach()))
    return gradient


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
