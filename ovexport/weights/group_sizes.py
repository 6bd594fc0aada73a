"""Which group sizes the CPU runtime computes rightly."""

from collections.abc import Iterable

from ovexport.errors import UnsupportedModelError
from ovexport.weights.layer import LayerFormat

SMALLEST_GROUP = 4
WRONG_GROUPS = (
    "the CPU runtime computes INT4 wrongly unless groups are a power of two, or one scale spans a row of even length"
)
ODD_INT8 = (
    "the CPU runtime computes INT8 of odd in-features wrongly in bfloat16; run it with INFERENCE_PRECISION_HINT f32, "
    "or keep the layer in floating point with compress.ignored"
)


def computed_rightly(group_size: int, in_features: int) -> bool:
    """Whether the CPU plugin of OpenVINO 2026.4 computes 4-bit weights of this group size rightly.

    It does where the size is a power of two, and where one scale spans a whole row of even length. Any other size,
    depending on the row's length, the instruction set and the inference precision, gives logits that are off by as much
    as the logits themselves (measured, tests/test_layers.py).
    """
    if group_size == in_features:
        return in_features % 2 == 0
    return group_size > 1 and group_size & (group_size - 1) == 0


def group_sizes(in_features: int, *, below: int) -> list[int]:
    """The group sizes from `SMALLEST_GROUP` up to `below` (exclusive) that divide `in_features` and are computed
    rightly."""
    sizes = range(SMALLEST_GROUP, min(below, in_features + 1))
    return [size for size in sizes if in_features % size == 0 and computed_rightly(size, in_features)]


def check_group_sizes(layers: Iterable[LayerFormat], origin: str) -> None:
    """Refuse layers of a checkpoint whose 4-bit groups the runtime would compute wrongly.

    Args:
        origin: the checkpoint, for the message.

    Raises:
        UnsupportedModelError: naming the first such layer and how many there are.
    """
    wrong = [
        layer
        for layer in layers
        if layer.encoding and layer.encoding.bits == 4 and not computed_rightly(layer.group_size, layer.in_features)
    ]
    if wrong:
        first, more = wrong[0], f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UnsupportedModelError(
            f"{origin}: has group size {first.group_size} in {first.name.removesuffix('.weight')}{more}, and "
            f"{WRONG_GROUPS}; tune it with another one"
        )
