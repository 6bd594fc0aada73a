"""Are the codes those that were tuned? By digest against what tuning recorded, and computed again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovexport.artifacts import Checkpoint, CheckpointManifest
from ovexport.errors import ArtifactError
from ovexport.openvino.graph import Weight, nibbles, raw, unpacked
from ovexport.openvino.matrices import Matrix
from ovexport.progress import Listener, Progress
from ovexport.reports import Check
from ovexport.storage.digests import bytes_digest
from ovexport.storage.tensorfile import TensorFile
from ovexport.verify.arithmetic import ExpectedCodes, ExpectedGrid, expected_grid, row_blocks
from ovexport.verify.checks import equal, readings, zero
from ovexport.verify.nncf_arithmetic import NncfCodes, nncf_grid
from ovexport.weights.layer import LayerFormat

Rows = Callable[[slice], NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatches:
    """Differing entries of a layer, and where the first one is."""

    codes: int = 0
    scales: int = 0
    zero_points: int = 0
    detail: str = ""


def trained_codes(graph_weights: tuple[Weight, ...], manifest: CheckpointManifest) -> list[Check]:
    """Digests of the IR's tensors against those that tuning recorded at its last step."""
    by_name = readings(graph_weights)
    return [
        equal(
            "as the checkpoint recorded it",
            subject.replace(layer.name, f"{layer.name} {part}", 1),
            bytes_digest(np.ascontiguousarray(unpacked(node))),
            getattr(manifest.digests[layer.name], part),
            "other values than those that were trained",
        )
        for layer in manifest.packed
        for subject, weight in by_name.get(layer.name, ())
        for part, node in (("codes", weight.codes), ("scale", weight.scale), ("zero_point", weight.zero_point))
        if weight.scale is not None and node is not None
    ]


def arithmetic(
    graph_weights: tuple[Weight, ...],
    checkpoint: Checkpoint,
    manifest: CheckpointManifest,
    matrices: Mapping[str, Matrix],
    listener: Listener,
) -> dict[str, Mismatches]:
    """By layer, and by way of reading it where there are several, how the IR differs from codes computed again from
    adapters and base weights.

    Args:
        matrices: of the base IR, by layer.

    Raises:
        ArtifactError: the base does not hold the weights that were tuned, or the checkpoint lacks a tensor.
    """
    by_name = readings(graph_weights)
    adapters = checkpoint.adapters
    changed = checkpoint.weights if manifest.replaced_weights else None
    mismatches = {}
    for index, layer in enumerate(manifest.packed):
        rows = _rows(layer, manifest, matrices, changed)
        for subject, weight in by_name.get(layer.name, ()):
            if weight.scale is not None:
                mismatches[subject] = _compare(layer, weight, rows, adapters)
        listener(Progress(task="verify", done=index + 1, total=len(manifest.packed)))
    return mismatches


def arithmetic_checks(mismatches: dict[str, Mismatches]) -> list[Check]:
    """A check per layer that it has no mismatch."""
    checks = []
    for name, counts in mismatches.items():
        total = counts.codes + counts.scales + counts.zero_points
        checks.append(zero("codes recomputed from the checkpoint", name, total, counts.detail))
    return checks


def changed_floats(
    graph: ov.Model, matrices: Mapping[str, Matrix], checkpoint: Checkpoint, manifest: CheckpointManifest
) -> list[Check]:
    """Weights that the method changed and left in floating point are the checkpoint's, rounded to the IR's type.

    Args:
        matrices: of the base IR, by layer.
    """
    layers = [layer for layer in manifest.layers if layer.mode == "float" and layer.name in manifest.replaced_weights]
    nodes = {node.get_friendly_name(): node for node in graph.get_ops()}
    checks = []
    for layer in layers:
        matrix = matrices.get(layer.name)
        node = nodes.get(matrix.node.get_friendly_name()) if matrix else None
        size = layer.out_features * layer.in_features
        if matrix is None or node is None or node.get_output_shape(0) != matrix.node.get_output_shape(0):
            checks.append(zero("changed weights as in the checkpoint", layer.name, size, "not in the graph"))
            continue
        own = Matrix(node, matrix.transposed).reader()(slice(None))
        expected = matrix.rounded(_changed(layer, checkpoint.weights))
        checks.append(zero("changed weights as in the checkpoint", layer.name, int(np.count_nonzero(own != expected))))
    return checks


def _rows(
    layer: LayerFormat,
    manifest: CheckpointManifest,
    matrices: Mapping[str, Matrix],
    changed: TensorFile | None,
) -> Rows:
    """A reader of rows of the weight that the adapters are added to, float32, known by the checkpoint's digest."""
    matrix = matrices.get(layer.name)
    if matrix is None:
        raise ArtifactError(
            f"{layer.name}: the base IR does not hold the weights this checkpoint was tuned on; "
            f"give the IR of {manifest.model}"
        )
    if changed is not None and layer.name in manifest.replaced_weights:
        own = _changed(layer, changed)
        return lambda rows: np.array(own[rows])
    return matrix.reader()


def _changed(layer: LayerFormat, changed: TensorFile) -> NDArray[np.float32]:
    """A weight that the method changed.

    Raises:
        ArtifactError: it is missing, or no matrix of finite float32 of the layer's shape.
    """
    own = changed.require(layer.name)
    shape = (layer.out_features, layer.in_features)
    if own.shape != shape or own.dtype != np.float32 or not np.isfinite(own).all():
        raise ArtifactError(f"weights.safetensors: {layer.name} is no finite float32 matrix {shape}; tune again")
    return own


@np.errstate(all="ignore")  # figures out of range, in a damaged checkpoint, give other codes: that is what is found
def _compare(layer: LayerFormat, weight: Weight, read: Rows, adapters: TensorFile) -> Mismatches:
    by_nncf = layer.arithmetic == "nncf"
    grid = nncf_grid(layer, adapters) if by_nncf else expected_grid(layer, adapters)
    try:
        scales, zero_points = _differing_grid(layer, weight, grid)
        stored = raw(weight.codes)
        if len(stored) != -(-layer.out_features * layer.in_features * weight.bits // 8):
            raise ValueError(f"{len(stored)} bytes of codes")
    except ValueError:
        return Mismatches(codes=layer.out_features * layer.in_features, detail="tensors of another shape or type")
    expected = NncfCodes(layer, adapters) if by_nncf else ExpectedCodes(layer, adapters)
    count, places = 0, []
    for rows in row_blocks(layer):
        codes = expected.rows(read(rows), rows)
        begin = rows.start * layer.in_features * weight.bits // 8
        differing = _differing_codes(codes, stored[begin : begin + -(-codes.size * weight.bits // 8)], weight)
        if len(differing):
            count += len(differing)
            row, column = divmod(int(differing[0]), layer.in_features)
            places.append((rows.start + row, column))
    first = {
        "codes": places[:1],
        "scales": np.argwhere(scales)[:1].tolist(),
        "zero points": np.argwhere(zero_points)[:1].tolist(),
    }
    detail = "; ".join(
        f"first of {name} at row {place[0][0]}, column {place[0][1]}" for name, place in first.items() if place
    )
    return Mismatches(
        codes=count,
        scales=int(np.count_nonzero(scales)),
        zero_points=int(np.count_nonzero(zero_points)),
        detail=detail,
    )


def _differing_grid(
    layer: LayerFormat, weight: Weight, expected: ExpectedGrid
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where scales and zero points differ, (output, groups).

    Raises:
        ValueError: they have another shape or type.
    """
    scale = unpacked(weight.scale)
    scales = scale.reshape(expected.scale.shape).view(np.uint16) != expected.scale.view(np.uint16)
    if expected.zero_point is None or weight.zero_point is None:
        if (expected.zero_point is None) != (weight.zero_point is None):
            raise ValueError("a zero point where there should be none, or none where there should be one")
        return scales, np.zeros((1, 1), np.bool_)
    zero_point = unpacked(weight.zero_point).reshape(layer.out_features, layer.groups)
    if zero_point.dtype != expected.zero_point.dtype:
        raise ValueError(f"zero points of type {zero_point.dtype}")
    bits = np.dtype(f"u{zero_point.itemsize}")
    return scales, zero_point.view(bits) != expected.zero_point.view(bits)


def _differing_codes(codes: NDArray[np.generic], stored: NDArray[np.uint8], weight: Weight) -> NDArray[np.intp]:
    """Positions, in one dimension, at which codes differ from what the IR stores.

    Args:
        codes: (rows, input), one to a byte.
        stored: bytes of the same rows: 4-bit codes two to a byte, low nibble first.
    """
    flat = codes.reshape(-1).view(np.uint8)
    if weight.bits == 8:
        return np.flatnonzero(flat != stored)
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    pairs = flat.view("<u2")
    packed = (pairs & 0x0F | pairs >> 4 & 0xF0).astype(np.uint8)
    if np.array_equal(packed, stored):
        return np.empty(0, np.intp)
    return np.flatnonzero(nibbles(packed) != nibbles(stored))
