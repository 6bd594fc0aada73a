"""How far each packed matrix is from the base model's: what rounding, and the adapters in it, changed."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ovexport.artifacts import CheckpointManifest
from ovexport.openvino.graph import Weight, nibbles, raw, unpacked
from ovexport.openvino.matrices import Matrix

_BLOCK_ENTRIES = 1 << 22


def weight_errors(
    graph_weights: tuple[Weight, ...], manifest: CheckpointManifest, matrices: Mapping[str, Matrix]
) -> dict[str, float]:
    """By layer, the Frobenius norm of the unpacked matrix less the base's, over the base's.

    Args:
        graph_weights: weights of an IR; those that do not fit the checkpoint's layers are left out.
        matrices: of the base IR, by layer.
    """
    by_name = {weight.name: weight for weight in graph_weights}
    errors = {}
    for layer in manifest.packed:
        weight, base = by_name.get(layer.name), matrices.get(layer.name)
        fits = weight is not None and weight.packed and weight.elements == layer.out_features * layer.in_features
        if weight is None or base is None or not fits:
            continue
        read = base.reader()
        squares, total = 0.0, 0.0
        step = max(1, _BLOCK_ENTRIES // layer.in_features)
        for begin in range(0, layer.out_features, step):
            rows = slice(begin, min(begin + step, layer.out_features))
            original = read(rows).astype(np.float64)
            with np.errstate(all="ignore"):  # a damaged scale can be anything; a check says so
                squares += float(np.square(_values(weight, rows, layer.in_features) - original).sum())
            total += float(np.square(original).sum())
        errors[layer.name] = float(np.sqrt(squares / total)) if total else 0.0
    return errors


def _values(weight: Weight, rows: slice, width: int) -> NDArray[np.float64]:
    """Rows of the matrix that the runtime computes with, (rows, width)."""
    codes = _codes(weight, rows, width).astype(np.float64)
    count = len(codes)
    grouped = codes.reshape(count, -1, weight.group_size)
    outputs = weight.elements // width
    scale = unpacked(weight.scale).reshape(outputs, -1, 1)[rows].astype(np.float64)
    if weight.zero_point is not None:
        grouped = grouped - unpacked(weight.zero_point).reshape(outputs, -1, 1)[rows].astype(np.float64)
    return (grouped * scale).reshape(count, width)


def _codes(weight: Weight, rows: slice, width: int) -> NDArray[np.generic]:
    """Codes of some rows, one to an entry."""
    if weight.bits == 8:
        return unpacked(weight.codes).reshape(-1, width)[rows]
    begin, end = rows.start * width, rows.stop * width
    values = nibbles(raw(weight.codes)[begin // 2 : -(-end // 2)])[begin % 2 : begin % 2 + end - begin]
    signed = (values ^ 8).astype(np.int8) - 8 if weight.element_type == "i4" else values
    return signed.reshape(-1, width)
