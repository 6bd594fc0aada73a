"""Are the codes those that were tuned? By digest against what tuning recorded, and computed anew."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovexport.artifacts import Checkpoint, CheckpointManifest, LayerFormat, bytes_digest
from ovexport.errors import ArtifactError
from ovexport.graph import Weight, matrices_by_digest, unpacked
from ovexport.progress import Listener, Progress
from ovexport.reports import Check
from ovexport.verify.arithmetic import ExpectedCodes, expected_codes
from ovexport.verify.checks import equal, zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatches:
    """Differing entries of a layer, and where the first one is."""

    codes: int = 0
    scales: int = 0
    zero_points: int = 0
    detail: str = ""


def trained_codes(found: tuple[Weight, ...], manifest: CheckpointManifest) -> list[Check]:
    """Digests of the IR's tensors against those that tuning recorded at its last step."""
    by_name = {weight.name: weight for weight in found}
    checks = []
    for layer in manifest.packed:
        weight = by_name.get(layer.name)
        if weight is None or weight.scale is None:
            continue
        recorded = manifest.digests[layer.name]
        tensors = {"codes": weight.codes, "scale": weight.scale}
        if weight.zero_point is not None:
            tensors["zero_point"] = weight.zero_point
        for part, node in tensors.items():
            digest = bytes_digest(np.ascontiguousarray(unpacked(node)))
            checks.append(
                equal(
                    "as the last tuning step used it",
                    f"{layer.name} {part}",
                    digest,
                    getattr(recorded, part),
                    "" if digest == getattr(recorded, part) else "other values than those that were trained",
                )
            )
    return checks


def arithmetic(
    found: tuple[Weight, ...],
    checkpoint: Checkpoint,
    manifest: CheckpointManifest,
    base: ov.Model,
    listener: Listener,
) -> dict[str, Mismatches]:
    """By layer, how the IR differs from codes computed anew from adapters and base weights."""
    by_name = {weight.name: weight for weight in found}
    adapters = checkpoint.adapters
    changed = checkpoint.weights if manifest.changed else None
    read_weight = _base_weights(base, manifest)
    mismatches = {}
    for index, layer in enumerate(manifest.packed):
        weight = by_name.get(layer.name)
        if weight is not None and weight.scale is not None:
            own = changed[layer.name] if changed is not None and layer.name in changed else read_weight(layer)
            mismatches[layer.name] = _compare(layer, weight, expected_codes(layer, own, adapters))
        listener(Progress(task="verify", done=index + 1, total=len(manifest.packed)))
    return mismatches


def arithmetic_checks(mismatches: dict[str, Mismatches]) -> list[Check]:
    """A check per layer that it has no mismatch."""
    checks = []
    for name, found in mismatches.items():
        total = found.codes + found.scales + found.zero_points
        checks.append(zero("codes recomputed from the checkpoint", name, total, found.detail))
    return checks


def _base_weights(base: ov.Model, manifest: CheckpointManifest) -> Callable[[LayerFormat], NDArray[np.float32]]:
    """A reader of the base weights, (output, input) float32, each known by the digest that the checkpoint holds."""
    matrices = matrices_by_digest(base, manifest.layers)

    def read(layer: LayerFormat) -> NDArray[np.float32]:
        found = matrices.get(manifest.weight_digests[layer.name])
        if not found:
            raise ArtifactError(
                f"{layer.name}: the base IR does not hold the weights this checkpoint was tuned on; "
                f"give the IR of {manifest.model_id}"
            )
        return found[0].floats()

    return read


def _compare(layer: LayerFormat, weight: Weight, expected: ExpectedCodes) -> Mismatches:
    try:
        codes = unpacked(weight.codes).reshape(layer.out_features, layer.in_features) != expected.codes
        actual = unpacked(weight.scale).reshape(layer.out_features, -1)
        scales = actual.view(np.uint16) != expected.scale.view(np.uint16)
        if expected.zero_point is None or weight.zero_point is None:
            zero_points = np.full((1, 1), (expected.zero_point is None) != (weight.zero_point is None))
        else:
            zero_points = unpacked(weight.zero_point).reshape(layer.out_features, -1) != expected.zero_point
    except ValueError:
        return Mismatches(codes=layer.out_features * layer.in_features, detail="tensors of another shape or type")
    places = {"codes": codes, "scales": scales, "zero points": zero_points}
    detail = "; ".join(
        f"first of {name} at row {int(np.argwhere(wrong)[0][0])}, column {int(np.argwhere(wrong)[0][1])}"
        for name, wrong in places.items()
        if wrong.any()
    )
    return Mismatches(
        codes=int(codes.sum()), scales=int(scales.sum()), zero_points=int(zero_points.sum()), detail=detail
    )
