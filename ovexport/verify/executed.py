"""Third line of evidence: does the compiled model run on packed weights, and on nothing else?"""

import math
from collections import Counter

import openvino as ov

from ovexport.openvino.graph import FLOAT_TYPES, PACKED_TYPES, Weight
from ovexport.openvino.runtime import ExecutedNode, compile_for_cpu, executed_nodes
from ovexport.reports import Check
from ovexport.verify.checks import zero


def executed(graph: ov.Model, name: str) -> list[ExecutedNode]:
    """The graph as the CPU executes it.

    Raises:
        UnsupportedModelError: the runtime can't compile it.
    """
    return executed_nodes(compile_for_cpu(graph, name, {}))


def runs_packed(nodes: list[ExecutedNode], graph: ov.Model, graph_weights: tuple[Weight, ...]) -> Check:
    """Each packed Linear is one FullyConnected that reads packed weights."""
    packed_nodes = {
        original
        for node in nodes
        if node.layer_type == "FullyConnected" and _packed_inputs(node)
        for original in node.originals
    }
    biased = _bias_additions(graph)
    wanted = [weight for weight in graph_weights if weight.packed and weight.layer_kind == "linear"]
    missing = []
    for weight in wanted:
        users = [
            name for name, consumer in zip(weight.consumer_names, weight.consumers, strict=True) if consumer == "MatMul"
        ]
        if not all(packed_nodes & {name, biased.get(name, name)} for name in users):
            missing.append(weight.name)
    return Check(
        name="packed Linears run on packed weights",
        subject="runtime",
        value=len(wanted) - len(missing),
        limit=len(wanted),
        passed=not missing,
        detail=f"decompressed to floating point: {', '.join(missing[:3])}" if missing else "",
    )


def no_float_weights(nodes: list[ExecutedNode], graph_weights: tuple[Weight, ...]) -> Check:
    """No constant of the executed graph is a packed matrix in floating point: none has as many elements as one.

    Scales and zero points of packed weights are left out, and matrices that the IR itself holds in floating point.
    """
    sizes = {weight.elements for weight in graph_weights if weight.packed}
    floats = Counter(
        math.prod(shape)
        for node in nodes
        for element_type, shape in node.constant_inputs
        if element_type in FLOAT_TYPES and math.prod(shape) in sizes - {math.prod(grid) for grid in _scale_shapes(node)}
    )
    floats -= Counter(weight.elements for weight in graph_weights if not weight.packed for _ in weight.consumers)
    detail = ", ".join(f"{count} of {size} elements" for size, count in floats.most_common(3))
    return zero("no weight in floating point in the executed graph", "runtime", sum(floats.values()), detail)


def _packed_inputs(node: ExecutedNode) -> list[tuple[int, ...]]:
    return [
        shape for element_type, shape in node.constant_inputs if element_type in PACKED_TYPES and math.prod(shape) > 1
    ]


def _scale_shapes(node: ExecutedNode) -> list[tuple[int, ...]]:
    """Of an operation that reads a packed weight, the shapes of its float inputs that are smaller than the weight."""
    packed = _packed_inputs(node)
    largest = max((math.prod(shape) for shape in packed), default=0)
    return [
        shape
        for element_type, shape in node.constant_inputs
        if element_type in FLOAT_TYPES and math.prod(shape) < largest
    ]


def _bias_additions(graph: ov.Model) -> dict[str, str]:
    """By MatMul, the Add that reads it alone: the runtime fuses the two and keeps the name of the second."""
    additions = {}
    for node in graph.get_ordered_ops():
        readers = [target.get_node() for target in node.output(0).get_target_inputs()] if node.outputs() else []
        if node.get_type_name() == "MatMul" and len(readers) == 1 and readers[0].get_type_name() == "Add":
            additions[node.get_friendly_name()] = readers[0].get_friendly_name()
    return additions
