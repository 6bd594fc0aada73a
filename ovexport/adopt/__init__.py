"""Stage adopt: a checkpoint file of NNCF's examples becomes a checkpoint of ours."""

from ovexport.adopt.checkpoint import adopt

__all__ = ["adopt"]
