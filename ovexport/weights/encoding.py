"""What a mode means: everything about codes, scales and zero points that follows from its name.

`verify` keeps a table of its own, so that a mistake here can't hide in the proof; a test compares the two.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Mode = Literal["int4_asym", "int4_asym_f16zp", "int4_sym", "int8_asym", "int8_sym", "float"]

ZeroPoints = Literal["codes", "float16", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How a mode stores a matrix: one code per entry, and per group of input channels a float16 scale and, where there
    are zero points, one of these.

        entry = (code - zero_point) · scale

    Attributes:
        mode: its name in recipes and manifests.
        bits: of a code.
        signed: codes are two's complement.
        zero_points: "codes": one per group, stored as a code is; "float16": one per group, any float16 value, which is
            how QA-LoRA's adapters are absorbed without rounding them to whole steps; "none": 0 everywhere.
    """

    mode: Mode
    bits: Literal[4, 8]
    signed: bool
    zero_points: ZeroPoints

    @property
    def symmetric(self) -> bool:
        """Whether there is no zero point, so that the scale alone sets the range."""
        return self.zero_points == "none"

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def highest(self) -> int:
        """The highest code."""
        return self.lowest + (1 << self.bits) - 1

    @property
    def zero_point_type(self) -> str:
        """OpenVINO's name of the type of zero points; that of the codes where there are none."""
        return "f16" if self.zero_points == "float16" else self.element_type

    @property
    def element_type(self) -> str:
        """OpenVINO's name of the type of codes: "u4", "i4", "u8" or "i8"."""
        return f"{'i' if self.signed else 'u'}{self.bits}"

    @property
    def code_dtype(self) -> Literal["int8", "uint8"]:
        """The type of unpacked codes, and of zero points stored as such, by the name that NumPy and torch share."""
        return "int8" if self.signed else "uint8"

    def packed_bytes(self, count: int) -> int:
        """The bytes of so many packed codes, or zero points."""
        return -(-count * self.bits // 8)

    def layer_bytes(self, entries: int, groups: int) -> int:
        """The bytes of a matrix in the IR: packed codes, float16 scales, zero points.

        Args:
            groups: how many scales it has in all.
        """
        zero_points = {"codes": self.packed_bytes(groups), "float16": 2 * groups, "none": 0}[self.zero_points]
        return self.packed_bytes(entries) + 2 * groups + zero_points

    def pack(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Codes or zero points as they lie in the IR: 8-bit ones a byte each, 4-bit ones two to a byte, the first in
        the low half, and 0 in the last byte's high half where their count is odd.

        Args:
            values: of `code_dtype` and any shape; packed in C order.

        Returns:
            (bytes,).
        """
        flat = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        if self.bits == 8:
            return flat
        if len(flat) % 2:
            flat = np.append(flat, np.uint8(0))
        packed: NDArray[np.uint8] = flat[0::2] & np.uint8(0x0F) | flat[1::2] << np.uint8(4)
        return packed


ENCODINGS = {
    encoding.mode: encoding
    for encoding in (
        Encoding(mode="int4_asym", bits=4, signed=False, zero_points="codes"),
        Encoding(mode="int4_asym_f16zp", bits=4, signed=False, zero_points="float16"),
        Encoding(mode="int4_sym", bits=4, signed=True, zero_points="none"),
        Encoding(mode="int8_asym", bits=8, signed=False, zero_points="codes"),
        Encoding(mode="int8_sym", bits=8, signed=True, zero_points="none"),
    )
}
"""The encoding of each mode; "float", which leaves a matrix as it is, has none."""


def encoding_of(*, bits: int, zero_points: ZeroPoints) -> Encoding:
    """The encoding with so many bits and such zero points.

    Raises:
        KeyError: there is none.
    """
    for encoding in ENCODINGS.values():
        if (encoding.bits, encoding.zero_points) == (bits, zero_points):
            return encoding
    raise KeyError(f"no mode has {bits} bits")
