"""Stage verify: the proof that an IR is what was tuned. Needs openvino and NumPy, never torch."""

from ovexport.verify.proof import verify

__all__ = ["verify"]
