"""How much an error of a layer's weights costs, measured on text: second moments of what the layer reads, and of the
slope of the model's own loss at what the layer gives.

For a small error E of a layer's weights, (output, input), the divergence from the uncompressed model is about

    KL = 1/2 · tr(H_O · E · H_I · Eᵀ)   nats per token

    H_I = mean of x·xᵀ over the tokens     x: what the layer reads
    H_O = mean of g·gᵀ over the tokens     g: slope of -log p(y) at the layer's outputs

with y drawn from the model's own distribution p, which makes g·gᵀ the Fisher information of the model's predictions.
That the two can be averaged apart is the approximation.

Sources: Martens and Grosse, arXiv:1503.05671 (the factors); Tseng, Sun and De Sa, arXiv:2505.22988 (rounding with
both).
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ovexport.models.architecture import Architecture
from ovexport.models.blocks import Block, embedding_slopes, walk_blocks_back
from ovexport.models.head import Head

LARGEST_OUTPUTS = 32768
"""Of a layer with more outputs than that, the moments of the slopes are not gathered: they would take 4 GiB."""
_SAMPLED_TOKENS = 256
_STRIPE = 256


def add_products(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ·rows to a sum, of which the upper triangle counts: nearly half the arithmetic is saved.

    Args:
        total: (size, size) float32; `mirrored` makes it whole.
        rows: (tokens, size).
    """
    for begin in range(0, len(total), _STRIPE):
        total[begin : begin + _STRIPE, begin:].addmm_(rows[:, begin : begin + _STRIPE].T, rows[:, begin:])


def mirrored(total: Tensor) -> Tensor:
    """A sum with its upper triangle copied to the lower, in place."""
    for begin in range(0, len(total), _STRIPE):
        end = begin + _STRIPE
        square = total[begin:end, begin:end]
        square.copy_(square.triu() + square.triu(1).T)
        total[end:, begin:end] = total[begin:end, end:].T
    return total


@dataclass(frozen=True, slots=True)
class Moments:
    """Means over the tokens of a text.

    Attributes:
        inputs: of x·xᵀ, (input, input) float32.
        outputs: of g·gᵀ, (output, output) float32; None for a layer with more than LARGEST_OUTPUTS outputs.
    """

    inputs: Tensor
    outputs: Tensor | None

    def slope(self, error: Tensor) -> Tensor:
        """H_O · E · H_I of an error of the weights, (output, input)."""
        weighted = error @ self.inputs
        return weighted if self.outputs is None else self.outputs @ weighted

    def cost(self, error: Tensor) -> float:
        """1/2 · tr(H_O · E · H_I · Eᵀ) of an error of the weights, (output, input): in nats per token, where both sides
        are there."""
        return float((self.slope(error).double() * error).sum()) / 2


def moments_by_block(
    network: PreTrainedModel, layers: Collection[str], tokens: Tensor, generator: torch.Generator
) -> Iterator[dict[str, Moments]]:
    """The moments of the layers of each decoder block, from the last block to the first, then those of embeddings and
    the head; one block's are in memory.

    A row of the embedding is read alone, and a row of the head gives one logit. So for both there is one matrix, on the
    inputs' side: the slopes' moments at the embedding's outputs, and the moments of the head's inputs. Where embedding
    and head are one matrix their costs add up: a row is looked up, and predicted, about as often as its token comes.

    Args:
        network: in float32, with the weights that the moments are to be of.
        layers: names of weights, such as "model.layers.0.mlp.down_proj.weight"; Linear layers outside the blocks are
            left out.
        tokens: token ids, (sequences, length), on the network's device.
        generator: draws the tokens y; on the CPU.

    Raises:
        UnsupportedModelError: the model has no list of decoder blocks.
    """
    architecture = Architecture(network)
    vocabulary = _Vocabulary(network, layers)

    def slope(hidden: Tensor) -> Tensor:
        vocabulary.add_hidden(hidden)
        return slope_at_drawn_tokens(architecture.head(), hidden, generator)

    slopes: list[Tensor] = []
    for block, slopes in walk_blocks_back(network, tokens, slope):
        held = [name for name in layers if block.holds(name)]
        sums = _Sums(block, held, architecture)
        with sums.gathering():
            for index, states in enumerate(block.inputs):
                slopes[index] = block.backward(states, slopes[index])
        yield sums.means(tokens.numel())
    if vocabulary.layers:
        for batch, at_block in zip(torch.split(tokens, len(slopes[0])), slopes, strict=True):
            vocabulary.add_slopes(embedding_slopes(network, batch, at_block))
        yield vocabulary.means(tokens.numel())


@torch.no_grad()
def slope_at_drawn_tokens(head: Head, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """The gradient of the sum of -log p(y) with respect to the hidden states that p is of, y drawn from p.

    Args:
        hidden: (sequences, length, hidden size) float32.

    Returns:
        Of the same shape.
    """
    flat = hidden.flatten(0, 1)
    result = torch.empty_like(flat)
    for begin in range(0, len(flat), _SAMPLED_TOKENS):
        part = slice(begin, begin + _SAMPLED_TOKENS)
        logits = head.logits(flat[part])
        slope = logits.softmax(-1)
        height = torch.rand(len(slope), 1, generator=generator).to(slope.device)
        drawn = torch.searchsorted(slope.cumsum(-1), height).clamp_(max=slope.shape[-1] - 1)
        slope.scatter_add_(-1, drawn, torch.full_like(height, -1.0))
        result[part] = head.backward(slope, logits)
    return result.reshape(hidden.shape)


class _Sums:
    """Sums of x·xᵀ and g·gᵀ of a block's layers; layers that read the same tensor share the former."""

    def __init__(self, block: Block, layers: list[str], architecture: Architecture) -> None:
        self._layers = {name: block.layer(name) for name in layers}
        self._groups = block.layers_by_input(layers)
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        for names in self._groups:
            shapes = {name: architecture.matrix(name).read().shape for name in names}
            device = block.inputs[0].device
            self._inputs[names[0]] = torch.zeros(shapes[names[0]][1], shapes[names[0]][1], device=device)
            for name, (out_features, _) in shapes.items():
                if out_features <= LARGEST_OUTPUTS:
                    self._outputs[name] = torch.zeros(out_features, out_features, device=device)

    def gathering(self) -> ExitStack:
        """Add what every pass through the block reads and sends back, until the end of a with statement."""
        stack = ExitStack()
        for name, layer in self._layers.items():
            stack.callback(layer.register_forward_hook(self._hook(name)).remove)
        return stack

    def means(self, tokens: int) -> dict[str, Moments]:
        """The moments, by layer; one that never ran is left out."""
        inputs = {name: mirrored(total) / tokens for name, total in self._inputs.items()}
        outputs = {name: mirrored(total) / tokens for name, total in self._outputs.items()}
        return {name: Moments(inputs[names[0]], outputs.get(name)) for names in self._groups for name in names}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add_outputs(slope: Tensor) -> None:
            add_products(self._outputs[name], slope.flatten(0, -2))

        def add(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if name in self._inputs:
                add_products(self._inputs[name], arguments[0].detach().flatten(0, -2))
            if name in self._outputs:
                output.register_hook(add_outputs)  # type: ignore[no-untyped-call]

        return add


class _Vocabulary:
    """Sums of the moments of embeddings and the head.

    Attributes:
        layers: names of the weights that it has moments of.
    """

    def __init__(self, network: PreTrainedModel, layers: Collection[str]) -> None:
        head = network.get_output_embeddings()
        self._paths = {
            f"{path}.weight": path for path, module in network.named_modules() if isinstance(module, nn.Embedding)
        }
        name_of_head = next((name for name, value in network.named_parameters() if head and value is head.weight), None)
        self._head = name_of_head if name_of_head in layers else None
        self.layers = {name for name in (*self._paths, self._head) if name in layers}
        self._sums: dict[str, Tensor] = {}

    def add_hidden(self, hidden: Tensor) -> None:
        """Count what the head reads, (sequences, length, hidden size)."""
        if self._head is not None:
            self._add(self._head, hidden)

    def add_slopes(self, slopes: Mapping[str, Tensor]) -> None:
        """Count the slopes at the outputs of embeddings, by path of the module."""
        for name, path in self._paths.items():
            if name in self.layers and path in slopes:
                self._add(name, slopes[path])

    def means(self, tokens: int) -> dict[str, Moments]:
        """The moments, by layer."""
        return {name: Moments(mirrored(total) / tokens, None) for name, total in self._sums.items()}

    def _add(self, name: str, values: Tensor) -> None:
        flat = values.flatten(0, -2)
        if name not in self._sums:
            self._sums[name] = flat.new_zeros(flat.shape[1], flat.shape[1])
        add_products(self._sums[name], flat)
