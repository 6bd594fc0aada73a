"""Models whose weights are 4-bit codes already, in the formats of other tools: read from safetensors, with nothing of
those tools. A format is one file here."""

from ovexport.models.packed import auto_round, awq, compressed_tensors, gptq
from ovexport.models.packed.folder import PackedFolder
from ovexport.models.packed.format import Layout, PackedFormat, packed_formats, recognized
from ovexport.models.packed.grid import PackedGrid
from ovexport.models.packed.state import network_state

__all__ = [
    "Layout",
    "PackedFolder",
    "PackedFormat",
    "PackedGrid",
    "auto_round",
    "awq",
    "compressed_tensors",
    "gptq",
    "network_state",
    "packed_formats",
    "recognized",
]
