"""What each mode is stored as, in the proof's own words: written down once more, so that a mistake in
`ovexport.weights.encoding` shows up as a difference between the IR and this table."""

from dataclasses import dataclass
from typing import Literal

from ovexport.weights.layer import LayerFormat


@dataclass(frozen=True, slots=True)
class Storage:
    """How a mode is stored in an IR.

    Attributes:
        element_type: of the codes, as OpenVINO writes it.
        lowest, highest: codes.
        zero_point_bits: of each group's zero point: as many as a code's, or 16 where it is a float16; 0 where there is
            none.
    """

    element_type: str
    bits: int
    lowest: int
    highest: int
    zero_point_bits: int

    @property
    def symmetric(self) -> bool:
        """Whether there is no zero point."""
        return self.zero_point_bits == 0


STORAGE = {
    "int4_asym": Storage("u4", 4, 0, 15, 4),
    "int4_asym_f16zp": Storage("u4", 4, 0, 15, 16),
    "int4_sym": Storage("i4", 4, -8, 7, 0),
    "int8_asym": Storage("u8", 8, 0, 255, 8),
    "int8_sym": Storage("i8", 8, -128, 127, 0),
}


def storage(layer: LayerFormat) -> Storage:
    """How a quantized layer is stored."""
    return STORAGE[layer.mode]


def predicted_bytes(layer: LayerFormat) -> int:
    """Bytes of a quantized layer's codes, float16 scales and zero points."""
    stored, scales = storage(layer), layer.out_features * layer.groups
    codes = (layer.out_features * layer.in_features * stored.bits + 7) // 8
    return codes + 2 * scales + (scales * stored.zero_point_bits + 7) // 8


def four_bit_mode(*, symmetric: bool) -> Literal["int4_asym", "int4_sym"]:
    """The mode of 4-bit codes with zero points that are codes too, or without any."""
    return "int4_sym" if symmetric else "int4_asym"
