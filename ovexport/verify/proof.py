"""The checks, one function each, put together to a VerificationReport."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovexport.artifacts import (
    IR,
    Checkpoint,
    CheckpointManifest,
    LayerFormat,
    bytes_digest,
    file_digest,
    files_in,
)
from ovexport.errors import ArtifactError
from ovexport.graph import (
    FLOAT_TYPES,
    Weight,
    constants,
    matrices_by_digest,
    raw,
    read_graph,
    type_name,
    unpacked,
    weights,
)
from ovexport.progress import Listener, Progress, silent
from ovexport.reports import Check, LayerRow, VerificationReport, VerificationSummary
from ovexport.runtime import executed_nodes
from ovexport.verify.arithmetic import ExpectedCodes, expected_codes
from ovexport.versions import stack_versions

ELEMENT_TYPES = {"int4_asym": "u4", "int4_sym": "i4", "int8_asym": "u8"}
RUNTIME_PACKED = frozenset({"u4", "i4", "u8", "i8"})
_ADAPTER_NAME = re.compile(r"(^|[./_])lora([./_]|$)", re.IGNORECASE)
_GRAPH_ONLY = frozenset({"openvino_model.xml", "openvino_model.bin"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatches:
    """Differing entries of a layer, and where the first one is."""

    codes: int = 0
    scales: int = 0
    zero_points: int = 0
    detail: str = ""


def verify(
    ir: IR,
    *,
    checkpoint: Checkpoint | None = None,
    base: IR | None = None,
    twin: IR | None = None,
    runtime: bool = True,
    listener: Listener = silent,
) -> VerificationReport:
    """Prove what can be proven of an IR from what is given beside it.

    Args:
        checkpoint: what was tuned; without it only the graph and the runtime are looked at.
        base: the IR of the uncompressed model, which holds the weights that the adapters are added to.
        twin: the IR with the same compression and no tuning.
        runtime: compile the IR for the CPU and look at the graph that is executed.

    Returns:
        The report; `passed` is false when any check failed.

    Raises:
        ArtifactError: an input is missing, unreadable, or of another base model.
    """
    graph = read_graph(ir)
    found = weights(graph)
    checks: list[Check] = []
    reasons: list[str] = []
    manifest = checkpoint.manifest if checkpoint else None
    mismatches: dict[str, Mismatches] | None = None
    adapter_nodes = _adapter_nodes(graph, found, manifest)
    checks.append(_zero("no adapter in the graph", "model", len(adapter_nodes), "; ".join(adapter_nodes[:3])))
    if checkpoint and manifest:
        checks += _structure(found, manifest)
        checks += _trained_codes(found, manifest)
        if base is None:
            reasons.append(
                "codes were compared by digest only: the BF16 IR, which holds the base weights, is not given"
            )
        else:
            mismatches = _arithmetic(found, checkpoint, manifest, read_graph(base), listener)
            checks += _arithmetic_checks(mismatches)
            checks.append(_other_constants(graph, found, read_graph(base), manifest))
        checks.append(_weight_bytes(found, manifest))
    else:
        reasons.append("no checkpoint is given: codes can't be compared with what was tuned")
    beyond = None
    if twin:
        beyond = operators_beyond(graph, read_graph(twin))
        checks.append(_zero("same operators as the twin", "model", sum(beyond.values()), _counts(beyond)))
        checks.append(_companions(ir, twin))
    else:
        reasons.append("no twin is given: operators can't be compared")
    running = None
    if runtime:
        running, not_packed = _runtime(graph, found)
        wanted = sum(1 for weight in found if weight.packed and weight.kind == "linear")
        checks.append(
            Check(
                name="packed Linears run on packed weights",
                subject="runtime",
                value=running,
                limit=wanted,
                passed=running == wanted,
                detail="; ".join(not_packed[:3]),
            )
        )
    else:
        reasons.append("the runtime was not looked at")
    return VerificationReport(
        passed=all(check.passed for check in checks),
        subject=str(ir.path),
        checks=tuple(checks),
        summary=_summary(found, graph, manifest, mismatches, adapter_nodes, beyond, running, reasons),
        layers=tuple(_row(weight) for weight in found),
        files={file.relative_to(ir.path).as_posix(): file_digest(file) for file in files_in(ir.path)},
        versions=stack_versions(),
    )


def operators_beyond(graph: ov.Model, twin: ov.Model) -> Counter[str]:
    """How often each operation type stands in one graph and not in the other, Constants left out."""
    own, other = _operators(graph), _operators(twin)
    return (own - other) + (other - own)


def _structure(found: tuple[Weight, ...], manifest: CheckpointManifest) -> list[Check]:
    """Every layer of the checkpoint is in the graph, as the recipe promised it, and no Linear beside them."""
    by_name = {weight.name: weight for weight in found}
    checks = []
    for layer in manifest.packed:
        weight = by_name.get(layer.name)
        promised = f"{ELEMENT_TYPES[layer.mode]} {layer.out_features}x{layer.in_features} group {layer.group_size}"
        if weight is None:
            detail = "the layer is not in the graph, or is left in floating point"
            checks.append(_equal("layer packed as promised", layer.name, None, promised, detail))
            continue
        rows = weight.shape[0]
        actual = f"{weight.element_type} {rows}x{weight.elements // rows} group {weight.group_size}"
        checks.append(_equal("layer packed as promised", layer.name, actual, promised))
    floats = sum(1 for weight in found if not weight.packed)
    allowed = sum(1 for layer in manifest.layers if layer.mode == "float")
    names = [weight.name for weight in found if not weight.packed]
    checks.append(_equal("matrices left in floating point", "model", floats, allowed, ", ".join(names[:3])))
    return checks


def _trained_codes(found: tuple[Weight, ...], manifest: CheckpointManifest) -> list[Check]:
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
                _equal(
                    "as the last tuning step used it",
                    f"{layer.name} {part}",
                    digest,
                    getattr(recorded, part),
                    "" if digest == getattr(recorded, part) else "other values than those that were trained",
                )
            )
    return checks


def _arithmetic(
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


def _arithmetic_checks(mismatches: dict[str, Mismatches]) -> list[Check]:
    checks = []
    for name, found in mismatches.items():
        total = found.codes + found.scales + found.zero_points
        checks.append(_zero("codes recomputed from the checkpoint", name, total, found.detail))
    return checks


def _other_constants(graph: ov.Model, found: tuple[Weight, ...], base: ov.Model, manifest: CheckpointManifest) -> Check:
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


def _weight_bytes(found: tuple[Weight, ...], manifest: CheckpointManifest) -> Check:
    predicted = sum(layer.weight_bytes for layer in manifest.packed)
    actual = sum(weight.byte_size for weight in found if weight.packed)
    return _equal("bytes of packed weights as predicted", "model", actual, predicted)


def _companions(ir: IR, twin: IR) -> Check:
    """Tokenizer, templates and configurations are the twin's."""
    differing = [
        file.name
        for file in files_in(twin.path)
        if file.name not in _GRAPH_ONLY
        and (not (ir.path / file.name).is_file() or file_digest(ir.path / file.name) != file_digest(file))
    ]
    return _zero("tokenizer and configurations as the twin's", "files", len(differing), ", ".join(differing))


def _adapter_nodes(graph: ov.Model, found: tuple[Weight, ...], manifest: CheckpointManifest | None) -> list[str]:
    """Operations of an adapter: LoRA states and names, and MatMuls with weights that the checkpoint does not know."""
    named = [
        node.get_friendly_name() for node in graph.get_ordered_ops() if _ADAPTER_NAME.search(node.get_friendly_name())
    ]
    if manifest is None:
        return named
    names = {layer.name for layer in manifest.layers}
    allowed = sum(1 for layer in manifest.layers if layer.mode == "float" and layer.kind != "embedding")
    linears = [weight for weight in found if weight.kind == "linear"]
    floats = [weight for weight in linears if not weight.packed]
    strangers = [weight for weight in linears if weight.packed and weight.name not in names]
    strangers += floats if len(floats) > allowed else []
    return named + [name for weight in strangers for name in weight.consumer_names]


def _runtime(graph: ov.Model, found: tuple[Weight, ...]) -> tuple[int, list[str]]:
    """How many packed Linears run as one node that reads packed weights, and the names of those that don't."""
    compiled = ov.Core().compile_model(graph, "CPU")
    packed_nodes = {
        original
        for node in executed_nodes(compiled)
        if node.kind == "FullyConnected" and any(kind in RUNTIME_PACKED for kind, _ in node.constant_inputs)
        for original in node.originals
    }
    biased = _bias_additions(graph)
    running, missing = 0, []
    for weight in found:
        if not weight.packed or weight.kind != "linear":
            continue
        users = [name for name, kind in zip(weight.consumer_names, weight.consumers, strict=True) if kind == "MatMul"]
        if all(packed_nodes & {name, biased.get(name, name)} for name in users):
            running += 1
        else:
            missing.append(f"{weight.name} is decompressed to floating point")
    return running, missing


def _bias_additions(graph: ov.Model) -> dict[str, str]:
    """By MatMul, the Add that reads it alone: the runtime fuses the two and keeps the name of the second."""
    additions = {}
    for node in graph.get_ordered_ops():
        readers = [target.get_node() for target in node.output(0).get_target_inputs()] if node.outputs() else []
        if node.get_type_name() == "MatMul" and len(readers) == 1 and readers[0].get_type_name() == "Add":
            additions[node.get_friendly_name()] = readers[0].get_friendly_name()
    return additions


def _summary(
    found: tuple[Weight, ...],
    graph: ov.Model,
    manifest: CheckpointManifest | None,
    mismatches: dict[str, Mismatches] | None,
    adapter_nodes: list[str],
    beyond: Counter[str] | None,
    running: int | None,
    reasons: list[str],
) -> VerificationSummary:
    linear = [weight for weight in found if weight.kind == "linear"]
    packed = [weight for weight in found if weight.packed]
    bits = sum(8 * weight.byte_size for weight in found)
    elements = sum(weight.elements for weight in found)
    return VerificationSummary(
        linear_layers=len(linear),
        packed_int4=sum(1 for weight in linear if weight.packed and weight.element_type in ("u4", "i4")),
        packed_int8=sum(1 for weight in linear if weight.packed and weight.element_type in ("u8", "i8")),
        float=sum(1 for weight in linear if not weight.packed),
        code_mismatches=None if mismatches is None else sum(row.codes for row in mismatches.values()),
        scale_mismatches=None if mismatches is None else sum(row.scales for row in mismatches.values()),
        zero_point_mismatches=None if mismatches is None else sum(row.zero_points for row in mismatches.values()),
        adapter_nodes=len(adapter_nodes),
        operators_beyond_twin=None if beyond is None else sum(beyond.values()),
        runtime_packed_linears=running,
        weight_bytes=sum(weight.byte_size for weight in packed),
        predicted_weight_bytes=sum(layer.weight_bytes for layer in manifest.packed) if manifest else None,
        bits_per_weight=bits / elements if elements else None,
        reason="; ".join(reasons) or None,
    )


def _row(weight: Weight) -> LayerRow:
    return LayerRow(
        name=weight.name,
        kind=weight.kind,
        element_type=weight.element_type,
        shape=weight.shape,
        group_size=weight.group_size,
        weight_bytes=weight.byte_size,
    )


def _operators(graph: ov.Model) -> Counter[str]:
    return Counter(node.get_type_name() for node in graph.get_ordered_ops() if node.get_type_name() != "Constant")


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counter.most_common(5))


def _zero(name: str, subject: str, value: int, detail: str = "") -> Check:
    return Check(name=name, subject=subject, value=value, limit=0, passed=value == 0, detail=detail if value else "")


def _equal(name: str, subject: str, value: Any, limit: Any, detail: str = "") -> Check:
    same = value == limit
    return Check(name=name, subject=subject, value=value, limit=limit, passed=same, detail="" if same else detail)
