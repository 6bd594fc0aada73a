"""What an IR is: what its Linear layers are stored in, and whether tuning changed them."""

from collections import Counter
from typing import Any

import openvino as ov

from ovexport.artifacts import IR
from ovexport.openvino.graph import read_graph, weights

_NAMES = {"bf16": "BF16", "f16": "FP16", "f32": "FP32", "f64": "FP64", "u4": "INT4", "i4": "INT4", "u8": "INT8"}
_NAMES |= {"i8": "INT8", "u2": "INT2"}


def identify(ir: IR) -> dict[str, Any]:
    """What reports say of a model: `weights`, such as "BF16" or "INT4", `tuning_steps`, where it is known, and
    `adapter`, where one lies beside the weights.

    `tuning_steps` is 0 where no tuning is in the weights: none took place, or nothing validated better than the start.

    Raises:
        ArtifactError: the IR can't be read.
    """
    manifest = ir.manifest
    steps = manifest.tuning_steps if manifest else None
    identity = {"weights": weight_precision(read_graph(ir))}
    if ir.adapter is not None:
        identity["adapter"] = "beside the weights"
    return identity if steps is None else identity | {"tuning_steps": steps}


def weight_precision(graph: ov.Model) -> str:
    """What most Linear layers of a graph are stored in, as people write it: "BF16", "FP16", "FP32", "INT4", …"""
    counts = Counter(weight.element_type for weight in weights(graph) if weight.layer_kind == "linear")
    if not counts:
        return "no weights"
    stored = counts.most_common(1)[0][0]
    return _NAMES.get(stored, stored.upper())
