"""Is the graph what was promised? Layers, formats, constants, operators, adapters, companions."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import openvino as ov

from ovexport.artifacts import IR, CheckpointManifest, bytes_digest, file_digest, files_in
from ovexport.graph import FLOAT_TYPES, Weight, constants, raw, type_name, weights
from ovexport.reports import Check
from ovexport.verify.checks import equal, zero

ELEMENT_TYPES = {"int4_asym": "u4", "int4_sym": "i4", "int8_asym": "u8"}
_ADAPTER_NAME = re.compile(r"(^|[./_])lora([./_]|$)", re.IGNORECASE)
_GRAPH_ONLY = frozenset({"openvino_model.xml", "openvino_model.bin"})


def structure(found: tuple[Weight, ...], manifest: CheckpointManifest) -> list[Check]:
    """Every layer of the checkpoint is in the graph, as the recipe promised it, and no Linear beside them."""
    by_name = {weight.name: weight for weight in found}
    checks = []
    for layer in manifest.packed:
        weight = by_name.get(layer.name)
        promised = f"{ELEMENT_TYPES[layer.mode]} {layer.out_features}x{layer.in_features} group {layer.group_size}"
        if weight is None:
            detail = "the layer is not in the graph, or is left in floating point"
            checks.append(equal("layer packed as promised", layer.name, None, promised, detail))
            continue
        rows = weight.shape[0]
        actual = f"{weight.element_type} {rows}x{weight.elements // rows} group {weight.group_size}"
        checks.append(equal("layer packed as promised", layer.name, actual, promised))
    floats = sum(1 for weight in found if not weight.packed)
    allowed = sum(1 for layer in manifest.layers if layer.mode == "float")
    names = [weight.name for weight in found if not weight.packed]
    checks.append(equal("matrices left in floating point", "model", floats, allowed, ", ".join(names[:3])))
    return checks


def packed_bytes(found: tuple[Weight, ...], manifest: CheckpointManifest) -> Check:
    """Codes, scales and zero points take the bytes that the formats predict."""
    predicted = sum(layer.weight_bytes for layer in manifest.packed)
    actual = sum(weight.byte_size for weight in found if weight.packed)
    return equal("bytes of packed weights as predicted", "model", actual, predicted)


def other_constants(graph: ov.Model, found: tuple[Weight, ...], base: ov.Model, manifest: CheckpointManifest) -> Check:
    """Norms, biases and tables: the floats beside the matrices are those of the base IR, bit for bit."""
    left = _other_floats(graph, found)
    expected = _other_floats(base, weights(base))
    changed = sum(1 for layer in manifest.layers if layer.mode == "float" and layer.name in manifest.changed)
    differing = sum(((left - expected) + (expected - left)).values())
    return Check(
        name="all other constants as in the base IR",
        subject="model",
        value=differing,
        limit=2 * changed,
        passed=differing <= 2 * changed,
        detail="norms, biases or tables differ" if differing > 2 * changed else "",
    )


def _other_floats(graph: ov.Model, found: tuple[Weight, ...]) -> Counter[str]:
    packed = {
        node.get_friendly_name()
        for weight in found
        for node in (weight.codes, weight.scale, weight.zero_point)
        if node is not None
    }
    return Counter(
        f"{type_name(node)} {tuple(node.get_output_shape(0))} {bytes_digest(raw(node))}"
        for node in constants(graph)
        if type_name(node) in FLOAT_TYPES and node.get_friendly_name() not in packed
    )


def companions(ir: IR, twin: IR) -> Check:
    """Tokenizer, templates and configurations are the twin's."""
    differing = [
        name
        for name in sorted(
            {file.relative_to(folder).as_posix() for folder in (ir.path, twin.path) for file in files_in(folder)}
        )
        if name not in _GRAPH_ONLY and _digest_or_none(ir.path / name) != _digest_or_none(twin.path / name)
    ]
    return zero("tokenizer and configurations as the twin's", "files", len(differing), ", ".join(differing))


def _digest_or_none(path: Path) -> str | None:
    return file_digest(path) if path.is_file() else None


def same_wiring(graph: ov.Model, twin: ov.Model) -> Check:
    """Operation by operation in execution order: type, attributes, where each input comes from, and every constant
    that is not a packed weight are the twin's."""
    own, other = list(_wiring(graph)), list(_wiring(twin))
    pairs = zip(own, other, strict=False)
    differing = [name for (name, ours), (_, theirs) in pairs if ours != theirs]
    count = len(differing) + abs(len(own) - len(other))
    return zero("wired as the twin", "model", count, f"first at {differing[0]}" if differing else "other lengths")


def _wiring(graph: ov.Model) -> Iterator[tuple[str, tuple[object, ...]]]:
    """Each operation's name and what identifies it but for names and packed values."""
    packed = {
        node.get_friendly_name()
        for weight in weights(graph)
        if weight.packed
        for node in (weight.codes, weight.scale, weight.zero_point)
        if node is not None
    }
    order: dict[str, int] = {}
    for index, node in enumerate(graph.get_ordered_ops()):
        order[node.get_name()] = index
        name, kind = node.get_friendly_name(), node.get_type_name()
        sources = tuple((order[value.get_node().get_name()], value.get_index()) for value in node.input_values())
        if kind == "Constant":
            content = name if name in packed else bytes_digest(raw(node))
            yield name, (kind, type_name(node), tuple(node.get_output_shape(0)), content)
        else:
            yield name, (kind, sources, str(sorted(node.get_attributes().items(), key=str)))


def adapter_operations(graph: ov.Model, found: tuple[Weight, ...], manifest: CheckpointManifest | None) -> list[str]:
    """Operations of an adapter: LoRA states and names, and MatMuls with weights that the checkpoint does not know."""
    named = [
        node.get_friendly_name() for node in graph.get_ordered_ops() if _ADAPTER_NAME.search(node.get_friendly_name())
    ]
    if manifest is None:
        return named
    names = {layer.name for layer in manifest.layers}
    allowed = sum(1 for layer in manifest.layers if layer.mode == "float")
    linears = [weight for weight in found if weight.kind == "linear"]
    floats = [weight for weight in found if not weight.packed]
    strangers = [weight for weight in linears if weight.packed and weight.name not in names]
    strangers += floats if len(floats) > allowed else []
    return named + [name for weight in strangers for name in weight.consumer_names]


def operators_beyond(graph: ov.Model, twin: ov.Model) -> Counter[str]:
    """How often each operation type stands in one graph and not in the other, Constants left out."""
    own, other = _operators(graph), _operators(twin)
    return (own - other) + (other - own)


def _operators(graph: ov.Model) -> Counter[str]:
    return Counter(node.get_type_name() for node in graph.get_ordered_ops() if node.get_type_name() != "Constant")
