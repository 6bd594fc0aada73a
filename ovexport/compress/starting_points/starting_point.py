"""What a starting point is: the protocol, what it works on, and the registry of all of them."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.compress.roundings import Roundings
from ovexport.models.packed import PackedGrid
from ovexport.recipe import CompressSpec
from ovexport.registry import Registry
from ovexport.weights.layer import LayerFormat
from ovexport.weights.quantizer import TunableQuantizer


@dataclass(slots=True, kw_only=True)
class Start:
    """A model that is about to be tuned. Starting points change it in place, one after the other.

    A starting point may

    - set the grid of a quantizer: `quantizers[name].set_grid(step, low)`, or `set_scale(scale)` where it is symmetric;
      `quantizers[name].initialize(weight, generator)` sets the grid that rounding to nearest gives `weight`;
    - put other weights in the place of the model's: `replaced_weights[name] = weight`, float32 on the CPU;
    - set an adapter: write to `quantizers[name].lora_A` and `lora_B` under `torch.no_grad()`. Codes are those of
      `weight + lora_B @ lora_A`.

    What is not changed stays as rounding to nearest leaves it: the smallest grid that holds each group, `lora_B` zero.

    Attributes:
        network: the base model, on the CPU, in the type it was loaded in. It may be run and taken apart, but the
            tensors of its parameters must not be written to: they are `weights`. Copy it, or give a parameter a new
            tensor.
        spec: the recipe's section [compress].
        layers: the format of each weight matrix; `name` is the parameter's, `encoding` is None for a layer in floating
            point.
        weights: the base model's matrices by layer, (output, input); read only.
        quantizers: of the layers with an encoding, by name.
        replaced_weights: what takes the place of the model's weights, by layer, (output, input) float32.
        generator: the one source of random numbers; the recipe's seed sets it.
        calibration: token ids of training text, (sequences, length) int64; empty, (0, 0), unless a starting point of
            the recipe needs text.
        own_grids: of the layers that the base model's checkpoint holds as codes, by name; rounding sets them.
        roundings: of the base model's weights on both sides, if a budget made them when it chose the formats.
    """

    network: PreTrainedModel
    spec: CompressSpec
    layers: Sequence[LayerFormat]
    weights: Mapping[str, Tensor]
    quantizers: Mapping[str, TunableQuantizer]
    generator: torch.Generator
    calibration: Tensor
    own_grids: Mapping[str, PackedGrid] = field(default_factory=dict)
    replaced_weights: dict[str, Tensor] = field(default_factory=dict)
    roundings: Roundings | None = None

    def weight(self, name: str) -> Tensor:
        """The weight that a layer's codes are made from, (output, input): the replaced one, else the model's."""
        return self.replaced_weights.get(name, self.weights[name])


class StartingPoint(Protocol):
    """Weights, quantization grids and adapters for tuning to begin from.

    The stage compress makes an object without arguments, asks `check` before any work, and calls `apply` once, after
    rounding to nearest has set every quantizer. What `apply` leaves is the untuned twin, and step 0 of tuning.

    Derive from this class to take over its defaults, and register the class by a name that recipes use:

        from ovexport.compress import StartingPoint, starting_points

        @starting_points.register("halves")            # or an entry point in the group "ovexport.starting_points"
        class Halves(StartingPoint):
            replaces_weights = True

            def apply(self, start):                    # a Start
                for name, quantizer in start.quantizers.items():
                    start.replaced_weights[name] = start.weight(name).float() / 2
                    quantizer.initialize(start.replaced_weights[name], start.generator)

    Equal inputs have to give equal results to the last bit: draw random numbers from `start.generator` only.

    Attributes:
        needs_text: `apply` reads `start.calibration`.
        replaces_weights: `apply` may fill `start.replaced_weights`; `ovexport plan` then counts their memory.
    """

    needs_text: bool = False
    replaces_weights: bool = False

    def check(self, layers: Sequence[LayerFormat], spec: CompressSpec) -> None:
        """Refuse what it can't do, from the formats alone; nothing is refused by default.

        Raises:
            UnsupportedModelError, RecipeError: with the layer or the key, and the cure.
        """
        return

    @abstractmethod
    def apply(self, start: Start) -> None:
        """Change `start` in place.

        Raises:
            UnsupportedModelError: the model can't be done; the message says what to change in the recipe.
        """


starting_points: Registry[type[StartingPoint]] = Registry("ovexport.starting_points", "starting point")
"""By the name in `compress.starting_point`."""
