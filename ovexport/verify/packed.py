"""Are the codes those of a 4-bit checkpoint that the IR was made from? Each is compared with the file's."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovexport.openvino.graph import Weight, unpacked, walk
from ovexport.progress import Listener, Progress
from ovexport.reports import Check
from ovexport.verify.checks import equal, readings, zero
from ovexport.verify.codes import Mismatches
from ovexport.verify.modes import four_bit_mode, storage
from ovexport.verify.packed_files import FileLayer, PackedFiles
from ovexport.verify.wiring import expected_chains
from ovexport.weights.layer import LayerFormat

_MIDDLE = 8


def as_in_files(
    graph: ov.Model, graph_weights: tuple[Weight, ...], files: PackedFiles, listener: Listener
) -> tuple[list[Check], dict[str, Mismatches], tuple[LayerFormat, ...]]:
    """Every packed layer of the files is in the graph, with its codes, scales, zero points and order of inputs.

    Returns:
        The checks, the differing entries by layer, and the format that each layer has to have.

    Raises:
        ArtifactError: a layer of the files can't be unpacked.
    """
    by_name, orders = readings(graph_weights), _orders(graph)
    checks: list[Check] = []
    mismatches: dict[str, Mismatches] = {}
    layers = []
    for index, name in enumerate(files.layers):
        own = files.layer(name)
        layer = _format(f"{name}.weight", own)
        layers.append(layer)
        ways = by_name.get(layer.name, ())
        if not ways:
            detail = "no constant of this name is unpacked and used as a weight"
            checks.append(equal("layer packed as in the file", layer.name, None, layer.mode, detail))
        for subject, weight in ways:
            compared, found = _compare(subject, weight, layer, own, orders)
            checks += compared
            mismatches[subject] = found
        listener(Progress(task="verify", done=index + 1, total=len(files.layers)))
    return checks, mismatches, tuple(layers)


def _format(name: str, own: FileLayer) -> LayerFormat:
    outputs, inputs = own.codes.shape
    return LayerFormat(
        name=name,
        kind="linear",
        mode=four_bit_mode(symmetric=bool((own.zero_point == _MIDDLE).all())),
        out_features=outputs,
        in_features=inputs,
        group_size=inputs // own.scale.shape[1],
    )


def _compare(
    subject: str, weight: Weight, layer: LayerFormat, own: FileLayer, orders: dict[str, NDArray[np.int64]]
) -> tuple[list[Check], Mismatches]:
    """The checks on one way of reading a weight, and how many entries differ."""
    if weight.scale is None or weight.chain not in expected_chains(layer):
        whole = Mismatches(codes=own.codes.size, detail="unpacked in another way than the file's format")
        return [zero("codes as in the file", subject, whole.codes, whole.detail)], whole
    order = np.argsort(own.group_of_input, kind="stable")
    read = [orders.get(name, np.arange(layer.in_features)) for name in weight.consumer_names]
    strangers = sum(not np.array_equal(each, order) for each in read)
    symmetric = storage(layer).symmetric
    codes = unpacked(weight.codes).reshape(own.codes.shape).astype(np.int64) + (_MIDDLE if symmetric else 0)
    differing = codes != own.codes[:, order]
    scale = unpacked(weight.scale).reshape(own.scale.shape)
    scales = int(np.count_nonzero(scale.view(np.uint16) != np.ascontiguousarray(own.scale).view(np.uint16)))
    zero_points = 0
    if not symmetric:
        zero_points = int(np.count_nonzero(unpacked(weight.zero_point).reshape(own.scale.shape) != own.zero_point))
    places = np.argwhere(differing)
    first = f"first at row {places[0][0]}, column {places[0][1]}" if len(places) else ""
    found = Mismatches(codes=len(places), scales=scales, zero_points=zero_points, detail=first)
    return [
        zero("codes as in the file", subject, found.codes, first),
        zero("scales as in the file", subject, scales),
        zero("zero points as in the file", subject, zero_points),
        zero("inputs in the file's order", subject, strangers, "g_idx of the file gives another order"),
    ], found


def _orders(graph: ov.Model) -> dict[str, NDArray[np.int64]]:
    """By name of a MatMul, the order that a Gather puts its inputs in."""
    return {name: order for name, node in walk(graph) if node.get_type_name() == "MatMul" for order in _order(node)}


def _order(node: Any) -> Iterator[NDArray[np.int64]]:
    """The order in which a MatMul reads the entries of its first input's last axis, where it is not their own."""
    gather = node.input_value(0).get_node()
    if gather.get_type_name() != "Gather":
        return
    indices, axis = (_constant(gather.input_value(port).get_node()) for port in (1, 2))
    rank = len(gather.input_value(0).get_partial_shape())
    if (
        indices is not None
        and indices.ndim == 1
        and axis is not None
        and axis.reshape(-1).tolist() in ([-1], [rank - 1])
    ):
        yield indices


def _constant(node: Any) -> NDArray[np.int64] | None:
    """The values of a constant of whole numbers, converted or not; None where a node is none."""
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant" or node.get_output_element_type(0).to_string() not in ("i32", "i64"):
        return None
    return np.array(node.data, dtype=np.int64)
