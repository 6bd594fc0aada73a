"""What a format of 4-bit checkpoints is: how its configuration is recognized, how its tensors are laid out."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ovexport.errors import UnsupportedModelError
from ovexport.models.packed.grid import PackedGrid
from ovexport.registry import Registered, Registry

Shape = tuple[int, ...]
Tensors = Mapping[str, NDArray[Any]]
"""A layer's tensors by what follows its name, such as "qweight"."""


class Layout(Protocol):
    """How the tensors of a layer are laid out."""

    @property
    def codes_name(self) -> str:
        """The tensor with the codes, which a layer is known by."""

    def matrix_shapes(self, codes: Shape) -> tuple[Shape, Shape]:
        """The smallest and the largest matrix, (output, input), whose codes are a tensor of this shape."""

    def groups(self, tensors: Tensors) -> int:
        """Groups of inputs that share a scale, by the scales' shape."""

    def required(self, outputs: int, inputs: int, groups: int) -> dict[str, Shape]:
        """Shapes of the tensors that a layer has to have."""

    def optional(self, outputs: int, inputs: int, groups: int) -> dict[str, Shape]:
        """Shapes of those that it may have, a bias among them."""

    def codes(self, tensors: Tensors, shape: tuple[int, int]) -> NDArray[np.uint8]:
        """The codes, (output, input), 0 to 15, inputs in their own order."""

    def grid(self, name: str, tensors: Tensors, shape: tuple[int, int]) -> PackedGrid:
        """Scales, zero points and the order of inputs.

        Raises:
            ArtifactError, UnsupportedModelError: they can't be what they are for; `name` is the layer's.
        """


class PackedFormat(Protocol):
    """A format, registered under its name.

    Attributes:
        title: its name in messages.
    """

    title: str

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether a `quantization_config` of config.json is of this format, in any of its variants."""

    def layout(self, config: Mapping[str, Any]) -> Layout:
        """The layout of its layers.

        Raises:
            UnsupportedModelError: it is a variant that can't be read; the message is the reason alone.
        """

    def group_sizes(self, config: Mapping[str, Any]) -> frozenset[int]:
        """The group sizes that the configuration names; -1 for one scale per output."""


packed_formats: Registry[type[PackedFormat]] = Registry("ovexport.packed_formats", "format of 4-bit checkpoints")
"""By their names, which are those of `quant_method`."""


def recognized(config: Mapping[str, Any] | None) -> Registered[type[PackedFormat]] | None:
    """The format of a `quantization_config`; None where there is no such key or no format knows it."""
    if config is None:
        return None
    for registered in packed_formats.all():
        with registered.guarded():
            if registered.thing().recognizes(config):
                return registered
    return None


def require_value(config: Mapping[str, Any], key: str, *allowed: Any, default: Any = None) -> Any:
    """The value of a key.

    Raises:
        UnsupportedModelError: it is none of those that can be read.
    """
    value = config.get(key)
    value = default if value is None else value
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        readable = " or ".join(map(repr, allowed))
        raise UnsupportedModelError(f"has {key}={value!r:.60}, and only {readable} can be read")
    return value


def require_absent(config: Mapping[str, Any], *keys: str) -> None:
    """Refuse a configuration that asks for more than weights in 4 bits.

    Raises:
        UnsupportedModelError: one of the keys has a value.
    """
    for key in keys:
        if config.get(key) not in (None, False, {}, [], ""):
            raise UnsupportedModelError(f"has {key}, and only weights that are codes with a scale can be read")


def sizes_in(*tables: Any) -> frozenset[int]:
    """The values of `group_size` in tables, and in the tables in them."""
    found: set[int] = set()
    for table in tables:
        if isinstance(table, Mapping):
            size = table.get("group_size")
            found |= {size} if type(size) is int else set()
            found |= sizes_in(*table.values())
    return frozenset(found)
