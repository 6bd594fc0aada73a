"""Stage compress: which layers, in which format, from which starting point."""

from ovexport.compress.check import check
from ovexport.compress.stage import compress

__all__ = ["check", "compress"]
