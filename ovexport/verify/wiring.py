"""Is the graph, weights aside, the one that was traced?

Every operation gets a fingerprint: SHA-256 over its type, its attributes and the fingerprints of what it reads, down to
the bytes of the constants. A weight is a leaf: packed or not, it counts as the weight it stands for. So two graphs with
equal fingerprints at their ends compute the same function of equal weights, whatever their operations are called.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import openvino as ov

from ovexport.artifacts import CheckpointManifest, bytes_digest
from ovexport.graph import Weight, matrices_by_digest, raw, type_name, weight_inputs
from ovexport.reports import Check
from ovexport.verify.checks import zero


@dataclass(frozen=True, slots=True)
class Leaf:
    """What a weight constant stands for; `turned` when it is stored as (input, output)."""

    identity: str
    turned: bool = False


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation that the outputs depend on, weights and their decompression left out."""

    name: str
    kind: str
    fingerprint: str
    sources: tuple[str, ...]


def leaves_of_product(manifest: CheckpointManifest, base: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """By name of its constant, what each weight of a product stands for.

    Args:
        base: the leaves of the traced graph; a float weight that the method changed keeps its constant's name.
    """
    packed = {layer.name: Leaf(manifest.weight_digests[layer.name]) for layer in manifest.packed}
    return dict(base) | packed


def leaves_of_base(base: ov.Model, manifest: CheckpointManifest) -> dict[str, Leaf]:
    """By name of its constant, what each weight of the traced graph stands for, known by the digest of its bytes."""
    tuned = {layer.name for layer in manifest.packed} | set(manifest.changed)
    digests = {digest for name, digest in manifest.weight_digests.items() if name in tuned}
    return {
        matrix.node.get_friendly_name(): Leaf(digest, matrix.turned)
        for digest, matrices in matrices_by_digest(base, manifest.layers).items()
        if digest in digests
        for matrix in matrices
    }


def leaves_of_packed(found: tuple[Weight, ...]) -> dict[str, Leaf]:
    """Every packed weight as a leaf of its own name, to compare two products."""
    return {weight.name: Leaf(weight.name) for weight in found if weight.packed}


def operations(graph: ov.Model, leaves: Mapping[str, Leaf]) -> tuple[Operation, ...]:
    """The graph's operations in an order in which each comes after what it reads."""
    fingerprints: dict[str, str] = {}
    sources: dict[str, tuple[str, ...]] = {}
    nodes = graph.get_ordered_ops()
    for node in nodes:
        known = dict(_leaves_read(node, leaves))
        read = [value.get_node().get_name() for value in node.input_values()]
        inputs = [
            f"weight {known[port].identity}" if port in known else f"{fingerprints[name]} {value.get_index()}"
            for port, (name, value) in enumerate(zip(read, node.input_values(), strict=True))
        ]
        content = "\n".join((node.get_type_name(), _own(node, known), *inputs))
        fingerprints[node.get_name()] = hashlib.sha256(content.encode()).hexdigest()
        sources[node.get_name()] = tuple(name for port, name in enumerate(read) if port not in known)
    needed = _reached(nodes, sources)
    return tuple(
        Operation(
            name=node.get_friendly_name(),
            kind=node.get_type_name(),
            fingerprint=fingerprints[node.get_name()],
            sources=tuple(fingerprints[name] for name in sources[node.get_name()]),
        )
        for node in nodes
        if node.get_name() in needed
    )


def same_operations(ours: tuple[Operation, ...], theirs: tuple[Operation, ...], other: str) -> list[Check]:
    """A check that the operations are wired as the other graph's, and one that all constants but weights are its."""
    expected = {operation.fingerprint for operation in theirs}
    present = {operation.fingerprint for operation in ours}
    changed = [
        operation
        for operation in ours
        if operation.fingerprint not in expected and all(source in expected for source in operation.sources)
    ]
    lost = [operation for operation in theirs if operation.fingerprint not in present]
    readers = {source: operation.name for operation in reversed(ours) for source in operation.sources}
    constants = [
        f"{operation.name}, read by {readers.get(operation.fingerprint, 'nothing')}"
        for operation in changed
        if operation.kind == "Constant"
    ]
    wiring = [operation.name for operation in changed if operation.kind != "Constant"]
    if lost and not changed:
        wiring = [f"{operation.name} is missing" for operation in lost]
    return [
        zero(f"wired as the {other}", "model", len(wiring), f"first at {_some(wiring)}"),
        zero(f"all other constants as the {other}'s", "model", len(constants), _some(constants)),
    ]


def _some(names: list[str]) -> str:
    return "; ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _leaves_read(node: Any, leaves: Mapping[str, Leaf]) -> Iterator[tuple[int, Leaf]]:
    for port, weight in weight_inputs(node):
        if weight.name in leaves and not weight.transposed:
            yield port, leaves[weight.name]


def _own(node: Any, leaves: Mapping[int, Leaf]) -> str:
    """What an operation is but for its inputs."""
    kind = node.get_type_name()
    if kind == "Constant":
        return f"{type_name(node)} {tuple(node.get_output_shape(0))} {bytes_digest(raw(node))}"
    attributes = dict(node.get_attributes())
    if kind == "MatMul":
        for port, name in enumerate(("transpose_a", "transpose_b")):
            if port in leaves and leaves[port].turned:
                attributes[name] = not attributes[name]
    names = sorted(node.output(0).get_names()) if kind in ("Parameter", "Result") else []
    return f"{sorted(attributes.items(), key=str)} {names}"


def _reached(nodes: list[Any], sources: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Names of the operations that outputs and states depend on."""
    needed: set[str] = set()
    for node in reversed(nodes):
        name = node.get_name()
        if name in needed or node.get_type_name() in ("Result", "Assign", "Parameter"):
            needed.add(name)
            needed.update(sources[name])
    return needed
