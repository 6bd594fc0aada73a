"""What a mode means: bits, levels and how zero points are stored."""

from typing import Literal

Mode = Literal["int4_asym", "int4_sym", "int8_asym", "int8_sym", "float"]
BITS = {"int4_asym": 4, "int4_sym": 4, "int8_asym": 8, "int8_sym": 8}
LEVELS = {"int4_asym": (0, 15), "int4_sym": (-8, 7), "int8_asym": (0, 255), "int8_sym": (-128, 127)}
