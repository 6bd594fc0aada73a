"""Section [convert]."""

from typing import Literal

from ovexport.recipe.spec import Spec


class ConvertSpec(Spec):
    """What every IR of the run carries beside its weights.

    Attributes:
        kv_cache_precision: precision of the KV cache, written to the rt_info of bf16, plain and int4 alike, so that all
            three run under the same conditions.
    """

    kv_cache_precision: Literal["u8", "f16", "bf16", "f32"] = "u8"
