"""AutoRound, in its own format, which is GPTQ's or AWQ's layout under another name:

    auto_round:auto_gptq, auto_round:gptq      GPTQ with zero points less 1
    auto_round, auto_round:gptqmodel           GPTQ with zero points as they are
    auto_round:auto_awq, auto_round:awq        AWQ "gemm"

Layers with a setting of their own are in `extra_config`; one with 16 bits there has floats in the file.

Source: AutoRound's documentation of its formats, and what version 0.16 writes.
"""

from collections.abc import Mapping
from typing import Any

from ovexport.errors import UnsupportedModelError
from ovexport.models.packed.awq import AwqLayout
from ovexport.models.packed.format import Layout, packed_formats, require_absent, require_value, sizes_in
from ovexport.models.packed.gptq import GptqLayout, is_symmetric

_OF_A_KERNEL = ("exllamav2", "tritonv2", "triton", "marlin", "cuda", "torch")
"""What older versions append to the name of the packing."""


@packed_formats.register("auto-round")
class AutoRound:
    """AutoRound's own format."""

    title = "AutoRound"

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """As PackedFormat."""
        method = config.get("quant_method")
        return isinstance(method, str) and method.removeprefix("intel/").replace("_", "-") == "auto-round"

    def layout(self, config: Mapping[str, Any]) -> Layout:
        """As PackedFormat."""
        require_value(config, "bits", 4)
        require_value(config, "data_type", "int", default="int")
        require_absent(config, "rotation_config", "transform_config", "super_bits", "static_kv_dtype")
        require_value(config, "act_bits", 16, default=16)
        key = "packing_format" if config.get("packing_format") is not None else "backend"
        stated = config.get(key, "auto")
        symmetric = is_symmetric(config, "extra_config")
        match [part for part in str(stated).split(":") if part not in _OF_A_KERNEL]:
            case ["auto_round", "auto_gptq" | "gptq"] | ["auto"]:
                return GptqLayout(offset=1, symmetric=symmetric)
            case ["auto_round"] | ["auto_round", "gptqmodel"]:
                if key == "backend" and not symmetric:
                    raise UnsupportedModelError(
                        f"has {key}={stated!r:.60} and no packing_format, as AutoRound's first versions write it, and "
                        "these stored zero points in two ways"
                    )
                return GptqLayout(offset=0, symmetric=symmetric)
            case ["auto_round", "auto_awq" | "awq"]:
                return AwqLayout()
        raise UnsupportedModelError(
            f"has {key}={stated!r:.60}, and only auto_round, auto_round:auto_gptq and auto_round:auto_awq can be read"
        )

    def group_sizes(self, config: Mapping[str, Any]) -> frozenset[int]:
        """As PackedFormat."""
        return sizes_in(config)
