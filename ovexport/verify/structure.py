"""Is the IR what was promised? Layers, formats, bytes, operators and adapters."""

import re
from collections import Counter

import openvino as ov

from ovexport.artifacts import IR, CheckpointManifest
from ovexport.openvino.graph import Weight, runtime_options, stray_readers, walk
from ovexport.openvino.runtime_settings import converted_options
from ovexport.reports import Check
from ovexport.verify.checks import equal, readings, zero
from ovexport.verify.modes import predicted_bytes, storage
from ovexport.verify.wiring import expected_chains

_ADAPTER_NAME = re.compile(r"(^|[./_])lora([./_]|$)", re.IGNORECASE)


def structure(graph: ov.Model, graph_weights: tuple[Weight, ...], manifest: CheckpointManifest) -> list[Check]:
    """Every layer of the checkpoint is in the graph, as the recipe promised it, and no Linear beside them."""
    by_name = readings(graph_weights)
    twice = [subject for ways in by_name.values() if len(ways) > 1 for subject, _ in ways]
    stray = stray_readers(graph)
    checks = [
        zero("each weight stands once", "model", len(twice), ", ".join(twice[:3])),
        zero("packed weights are read whole", "model", len(stray), "; ".join(stray[:3])),
    ]
    for layer in manifest.packed:
        promised = f"{storage(layer).element_type} {layer.out_features}x{layer.in_features} group {layer.group_size}"
        if layer.name not in by_name:
            detail = "no constant of this name is unpacked and used as a weight"
            checks.append(equal("layer packed as promised", layer.name, None, promised, detail))
        for subject, weight in by_name.get(layer.name, ()):
            rows = weight.shape[0] if weight.shape else 0
            actual = f"{weight.element_type} {rows}x{weight.elements // max(1, rows)} group {weight.group_size}"
            if actual == promised and weight.chain not in expected_chains(layer):
                actual = f"{promised}, unpacked in another way"
            checks.append(equal("layer packed as promised", subject, actual, promised))
    names = [weight.name for weight in _floats(graph_weights, manifest)]
    allowed = sum(1 for layer in manifest.layers if layer.mode == "float")
    checks.append(equal("matrices left in floating point", "model", len(names), allowed, ", ".join(names[:3])))
    return checks


def _floats(graph_weights: tuple[Weight, ...], manifest: CheckpointManifest) -> list[Weight]:
    """The matrices in floating point, tables that are no layer (of positions, say) left out."""
    embeddings = {(layer.out_features, layer.in_features) for layer in manifest.layers if layer.kind != "linear"}
    return [
        weight
        for weight in graph_weights
        if not weight.packed and (weight.layer_kind == "linear" or weight.shape in embeddings)
    ]


def packed_bytes(graph_weights: tuple[Weight, ...], manifest: CheckpointManifest) -> Check:
    """Codes, scales and zero points take the bytes that the formats predict."""
    predicted = sum(predicted_bytes(layer) for layer in manifest.packed)
    actual = sum(weight.byte_size for weight in graph_weights if weight.packed)
    return equal("bytes of packed weights as predicted", "model", actual, predicted)


def note(weight: Weight) -> str | None:
    """What is not packed to 4 bits, and what that costs."""
    if weight.packed and weight.bits <= 4:
        return None
    stored = f"{weight.bits} bits" if weight.packed else f"not packed, {weight.element_type}"
    if weight.layer_kind == "embedding":
        return f"{stored}; a token reads one row: it costs size, not time"
    four_bits = weight.elements // 2
    return f"{stored}; every token reads {weight.byte_size / 1e6:.2f} MB, at 4 bits {four_bits / 1e6:.2f} MB and scales"


def same_options(ir: IR, graph: ov.Model, other: ov.Model, name: str) -> Check:
    """The IR tells the runtime what the other one tells it, but for what a search wrote into it and can be undone."""
    own = converted_options(ir, runtime_options(graph))
    return equal(f"runtime options as the {name}'s", "model", own, runtime_options(other))


def adapter_operations(
    graph: ov.Model, graph_weights: tuple[Weight, ...], manifest: CheckpointManifest | None
) -> list[str]:
    """Operations of an adapter: LoRA states and names, and MatMuls with weights that the checkpoint does not know."""
    named = [name for name, _ in walk(graph) if _ADAPTER_NAME.search(name)]
    if manifest is None:
        return named
    names = {layer.name for layer in manifest.layers}
    allowed = sum(1 for layer in manifest.layers if layer.mode == "float")
    linears = [weight for weight in graph_weights if weight.layer_kind == "linear"]
    floats = _floats(graph_weights, manifest)
    strangers = [weight for weight in linears if weight.packed and weight.name not in names]
    strangers += floats if len(floats) > allowed else []
    return named + [name for weight in strangers for name in weight.consumer_names]


def operators_beyond(graph: ov.Model, twin: ov.Model) -> Counter[str]:
    """How often each operation type stands in one graph and not in the other, Constants left out."""
    own, other = _operators(graph), _operators(twin)
    return (own - other) + (other - own)


def _operators(graph: ov.Model) -> Counter[str]:
    return Counter(node.get_type_name() for _, node in walk(graph) if node.get_type_name() != "Constant")
