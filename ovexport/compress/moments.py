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

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ovexport.models.architecture import Architecture
from ovexport.models.blocks import batches_of, decoder_blocks, embedding_slopes, layers_by_input, walk_spans_back
from ovexport.models.head import Head

LARGEST_OUTPUTS = 32768
"""Of a layer with more outputs than that, the moments of the slopes are not gathered: they would take 4 GiB."""
SUMS_BYTES = 2**32
"""How much the sums of the blocks that are gone through together take at most, unless one block takes more."""
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
    the head. In memory are those of as many blocks as SUMS_BYTES has room for, one at least: with all blocks the text
    goes through the model once, with fewer all but the last ones are computed twice.

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

    batches = batches_of(tokens)
    sums = _sums_by_block(network, layers, batches[0])
    length = SUMS_BYTES // max(1, *(each.nbytes for each in sums.values()))
    span = None
    for span in walk_spans_back(network, tokens, slope, max(1, length)):
        with ExitStack() as stack:
            for block in span.blocks:
                stack.enter_context(sums[block].gathering())
            span.run()
        for block in reversed(span.blocks):
            yield sums.pop(block).means(tokens.numel())
    if vocabulary.layers and span is not None:
        for batch, at_block in zip(batches, span.slopes, strict=True):
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


def _sums_by_block(network: PreTrainedModel, layers: Iterable[str], batch: Tensor) -> "dict[str, _Sums]":
    """What gathers the moments of each block's layers, by the block's name.

    Args:
        batch: token ids; what they run through is counted.
    """
    blocks = decoder_blocks(network)
    modules = {
        name: network.get_submodule(name.rpartition(".")[0])
        for name in layers
        if any(name.startswith(f"{block}.") for block in blocks)
    }
    groups = layers_by_input(modules, lambda: network.base_model(input_ids=batch, use_cache=False))
    architecture = Architecture(network)
    sums = {block: _Sums() for block in blocks}
    for names in groups:
        of = next(sums[block] for block in blocks if names[0].startswith(f"{block}."))
        of.count({name: modules[name] for name in names}, [architecture.matrix(name).read().shape for name in names])
    return sums


class _Sums:
    """Sums of x·xᵀ and g·gᵀ of a block's layers; layers that read the same tensor share the former.

    Attributes:
        nbytes: what they take.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._layers: dict[str, nn.Module] = {}
        self._leaders: dict[str, str] = {}
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}

    def count(self, layers: Mapping[str, nn.Module], shapes: Sequence[Sequence[int]]) -> None:
        """Count layers, too, which read one tensor.

        Args:
            layers: by the names of their weights.
            shapes: of the weights, (output, input).
        """
        self._layers |= layers
        self._leaders |= dict.fromkeys(layers, next(iter(layers)))
        sizes = [shapes[0][1], *(shape[0] for shape in shapes if shape[0] <= LARGEST_OUTPUTS)]
        self.nbytes += 4 * sum(size**2 for size in sizes)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Add what every pass through the block reads and sends back, until the end of a with statement."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.callback(layer.register_forward_hook(self._hook(name)).remove)
            yield

    def means(self, tokens: int) -> dict[str, Moments]:
        """The moments, by layer."""
        inputs = {name: mirrored(total).div_(tokens) for name, total in self._inputs.items()}
        outputs = {name: mirrored(total).div_(tokens) for name, total in self._outputs.items()}
        return {name: Moments(inputs[leader], outputs.get(name)) for name, leader in self._leaders.items()}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add_outputs(slope: Tensor) -> None:
            _add(self._outputs, name, slope)

        def add(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if self._leaders[name] == name:
                _add(self._inputs, name, arguments[0].detach())
            if output.shape[-1] <= LARGEST_OUTPUTS:
                output.register_hook(add_outputs)  # type: ignore[no-untyped-call]

        return add


def _add(sums: dict[str, Tensor], name: str, values: Tensor) -> None:
    """Add the products of values, (…, size), to a sum, which begins with the first ones."""
    flat = values.flatten(0, -2)
    if name not in sums:
        sums[name] = flat.new_zeros(flat.shape[1], flat.shape[1])
    add_products(sums[name], flat)


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
            _add(self._sums, self._head, hidden)

    def add_slopes(self, slopes: Mapping[str, Tensor]) -> None:
        """Count the slopes at the outputs of embeddings, by path of the module."""
        for name, path in self._paths.items():
            if name in self.layers and path in slopes:
                _add(self._sums, name, slopes[path])

    def means(self, tokens: int) -> dict[str, Moments]:
        """The moments, by layer."""
        return {name: Moments(mirrored(total) / tokens, None) for name, total in self._sums.items()}
