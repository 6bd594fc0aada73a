"""Section [convert]."""

from typing import Literal, Self

from pydantic import model_validator

from ovexport.recipe.spec import Spec


class ConvertSpec(Spec):
    """What every IR of the run carries beside its weights.

    Attributes:
        kv_cache_precision: precision of the KV cache, written to the rt_info of bf16, plain and int4 alike, so that all
            three run under the same conditions.
        formats: of the product: "openvino", which always is among them, and "onnx", which comes to lie in int4-onnx.
    """

    kv_cache_precision: Literal["u8", "f16", "bf16", "f32"] = "u8"
    formats: tuple[Literal["openvino", "onnx"], ...] = ("openvino",)

    @model_validator(mode="after")
    def _with_the_ir(self) -> Self:
        if "openvino" not in self.formats:
            raise ValueError('formats: lacks "openvino", which is proven and measured; add it')
        return self
