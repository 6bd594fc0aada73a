"""Stage verify: the proof that an IR is what was tuned. Needs openvino and NumPy, never torch."""

from ovexport.verify.onnx import is_onnx_folder, prove_onnx, verify_onnx
from ovexport.verify.packed_files import is_packed_folder
from ovexport.verify.proof import verify, with_checks

__all__ = ["is_onnx_folder", "is_packed_folder", "prove_onnx", "verify", "verify_onnx", "with_checks"]
