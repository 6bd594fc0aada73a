"""Stage adopt: a checkpoint file of NNCF's examples becomes a checkpoint of ours."""

from ovexport.readers.nncf import adopt

__all__ = ["adopt"]
