"""Stage compress: which layers, in which format, from which starting point."""

from ovexport.compress.stage import compress
from ovexport.compress.starting_points.nncf import check

__all__ = ["check", "compress"]
