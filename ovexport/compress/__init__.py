"""Stage compress: which layers, in which format, from which starting point."""

from ovexport.compress.allocation import limit_of
from ovexport.compress.arithmetic import operations
from ovexport.compress.check import check, plug_ins, replaces_weights
from ovexport.compress.stage import compress, evenly_spread
from ovexport.compress.starting_points import Start, StartingPoint, chosen, starting_points

__all__ = [
    "Start",
    "StartingPoint",
    "check",
    "chosen",
    "compress",
    "evenly_spread",
    "limit_of",
    "operations",
    "plug_ins",
    "replaces_weights",
    "starting_points",
]
