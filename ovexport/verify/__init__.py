"""Stage verify: the proof that an IR is what was tuned. Needs openvino and NumPy, never torch."""

from ovexport.verify.packed_files import is_packed_folder
from ovexport.verify.proof import verify

__all__ = ["is_packed_folder", "verify"]
