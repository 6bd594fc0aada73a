"""Is the adapter that lies beside the IR the one that was tuned?"""

import numpy as np

from ovexport.artifacts import IR, AdaptedLayer, Checkpoint, CheckpointManifest, PeftAdapter
from ovexport.errors import OvexportError
from ovexport.reports import Check
from ovexport.storage.tensorfile import TensorFile
from ovexport.verify.checks import zero

_NAME = "adapter as the checkpoint has it"


def adapter_checks(ir: IR, checkpoint: Checkpoint, manifest: CheckpointManifest) -> list[Check]:
    """Every layer's two matrices, the factor folded into the second, are those of the checkpoint to the last bit, and
    there are no others; nothing is checked where neither has an adapter that is not absorbed.

    An adapter whose second matrix is 0 adds nothing and is left out.
    """
    adapters = checkpoint.adapters
    expected = {
        layer.name.removesuffix(".weight"): (adapters.require(f"{layer.name}.lora_A"), lora_b)
        for layer in manifest.packed
        if layer.adapter == "beside" and layer.rank
        if (lora_b := _folded(adapters, layer.name, layer.adapter_factor)).any()
    }
    if ir.adapter is None:
        return [zero(_NAME, name, 1, "the IR has no adapter for it") for name in expected]
    try:
        actual = {layer.module: layer for layer in PeftAdapter.read(ir.adapter).layers}
    except OvexportError as error:
        return [zero(_NAME, "adapter", 1, str(error))]
    checks = [zero(_NAME, name, 1, "not in the checkpoint") for name in sorted(actual.keys() - expected.keys())]
    for name, matrices in expected.items():
        layer = actual.get(name)
        count = sum(each.size for each in matrices) if layer is None else _differing(layer, matrices)
        checks.append(zero(_NAME, name, count, "other values than those that were tuned"))
    return checks


def _folded(adapters: TensorFile, name: str, factor: float) -> np.ndarray:
    """The second matrix times the factor, in float64, rounded to float32."""
    return (adapters.require(f"{name}.lora_B").astype(np.float64) * factor).astype(np.float32)


def _differing(layer: AdaptedLayer, expected: tuple[np.ndarray, ...]) -> int:
    """Entries that differ; all of them where a shape or the factor does."""
    actual = (layer.lora_A, layer.lora_B)
    if layer.factor != 1 or any(one.shape != other.shape for one, other in zip(actual, expected, strict=True)):
        return sum(each.size for each in expected)
    return sum(
        int(np.count_nonzero(one.view(np.uint32) != np.ascontiguousarray(other, np.float32).view(np.uint32)))
        for one, other in zip(actual, expected, strict=True)
    )
