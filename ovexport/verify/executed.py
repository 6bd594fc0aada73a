"""Does the compiled model run on packed weights?"""

import openvino as ov

from ovexport.graph import Weight
from ovexport.reports import Check
from ovexport.runtime import executed_nodes

RUNTIME_PACKED = frozenset({"u4", "i4", "u8", "i8"})


def runs_packed(graph: ov.Model, found: tuple[Weight, ...]) -> Check:
    """Compiled for the CPU, each packed Linear is one FullyConnected that reads packed weights."""
    compiled = ov.Core().compile_model(graph, "CPU")
    packed_nodes = {
        original
        for node in executed_nodes(compiled)
        if node.kind == "FullyConnected" and any(kind in RUNTIME_PACKED for kind, _ in node.constant_inputs)
        for original in node.originals
    }
    biased = _bias_additions(graph)
    wanted = [weight for weight in found if weight.packed and weight.kind == "linear"]
    missing = []
    for weight in wanted:
        users = [name for name, kind in zip(weight.consumer_names, weight.consumers, strict=True) if kind == "MatMul"]
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


def _bias_additions(graph: ov.Model) -> dict[str, str]:
    """By MatMul, the Add that reads it alone: the runtime fuses the two and keeps the name of the second."""
    additions = {}
    for node in graph.get_ordered_ops():
        readers = [target.get_node() for target in node.output(0).get_target_inputs()] if node.outputs() else []
        if node.get_type_name() == "MatMul" and len(readers) == 1 and readers[0].get_type_name() == "Add":
            additions[node.get_friendly_name()] = readers[0].get_friendly_name()
    return additions
