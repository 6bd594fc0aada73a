"""Is the graph, weights aside, the one that was traced?

Every operation gets a fingerprint: SHA-256 over its type, its attributes and the fingerprints of what it reads, down to
the bytes of the constants, and of the graphs inside it with what goes in and out of them. A weight is a leaf: packed
or not, it counts as the weight it stands for. So two graphs with equal fingerprints at their ends compute the same
function of equal weights, whatever their operations are called. The constant of a tuned norm is a leaf as well.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov

from ovexport.artifacts import CheckpointManifest
from ovexport.openvino.graph import Weight, check_depth, raw, type_name, weight_inputs
from ovexport.openvino.matrices import Matrix
from ovexport.reports import Check
from ovexport.storage.digests import bytes_digest
from ovexport.verify.checks import zero
from ovexport.verify.modes import storage
from ovexport.verify.ports import Ports, ports
from ovexport.weights.layer import LayerFormat

_BROADCAST = "[('auto_broadcast', 'numpy')]"


@dataclass(frozen=True, slots=True)
class Leaf:
    """What a weight constant stands for.

    Attributes:
        transposed: it is stored as (input, output).
        chains: how it may be unpacked, as `graph.describe` writes it; None when that is not looked at.
    """

    identity: str
    transposed: bool = False
    chains: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation that the outputs depend on, weights and their decompression left out."""

    name: str
    operation_type: str
    fingerprint: str
    sources: tuple[str, ...]


def leaves_of_product(manifest: CheckpointManifest, base: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """By name of its constant, what each weight of a product stands for.

    Args:
        base: the leaves of the traced graph; a float weight that the method changed keeps its constant's name.
    """
    floats = {
        layer.name for layer in manifest.layers if layer.mode == "float" and layer.name in manifest.replaced_weights
    }
    changed = {name: leaf for name, leaf in base.items() if leaf.identity in floats}
    packed = {layer.name: Leaf(layer.name, chains=expected_chains(layer)) for layer in manifest.packed}
    return changed | packed


def expected_chains(layer: LayerFormat) -> tuple[str, ...]:
    """How the layer's codes must be unpacked, as `graph.describe` writes it, for each type it may be used in.

    Codes → Convert f16 [→ Subtract zero point] → Multiply scale [→ Reshape] → Convert: NNCF's DQ format.
    """
    stored = storage(layer)
    element_type = stored.element_type
    rows, columns, groups = layer.out_features, layer.in_features, layer.groups
    shape = (rows, groups, layer.group_size) if groups > 1 else (rows, columns)
    grid = (rows, groups, 1) if groups > 1 else (rows, 1)
    chain = _converted(f"{element_type} {shape}", "f16")
    if not stored.symmetric:
        codes = stored.zero_point_bits == stored.bits
        zero_point = _converted(f"{element_type} {grid}", "f16") if codes else f"f16 {grid}"
        chain = f"Subtract opset1 {_BROADCAST} ({chain}, {zero_point})"
    chain = f"Multiply opset1 {_BROADCAST} ({chain}, f16 {grid})"
    if groups > 1:
        chain = f"Reshape opset1 [('special_zero', False)] ({chain}, i64 (2,) [{rows}, {columns}])"
    return tuple(_converted(chain, result) for result in ("f32", "f16", "bf16"))


def _converted(source: str, element_type: str) -> str:
    return f"Convert opset1 [('destination_type', '{element_type}')] ({source})"


def leaves_of_base(matrices: Mapping[str, Matrix], manifest: CheckpointManifest) -> dict[str, Leaf]:
    """By name of its constant, what each weight of the traced graph stands for.

    Args:
        matrices: of the traced graph, by layer.
    """
    tuned = {layer.name for layer in manifest.packed} | set(manifest.replaced_weights)
    return {
        matrix.node.get_friendly_name(): Leaf(layer, matrix.transposed)
        for layer, matrix in matrices.items()
        if layer in tuned
    }


def leaves_of_packed(graph_weights: tuple[Weight, ...]) -> dict[str, Leaf]:
    """Every packed weight as a leaf of its own name and way of unpacking, to compare two products."""
    return {
        weight.name: Leaf(f"{weight.name} {weight.chain}", chains=(weight.chain,))
        for weight in graph_weights
        if weight.packed
    }


def operations(graph: ov.Model, leaves: Mapping[str, Leaf], norms: Collection[str] = ()) -> tuple[Operation, ...]:
    """The graph's operations, and those of the graphs inside them, in an order in which each comes after what it reads.

    Args:
        norms: names of constants that count as what they are called, whatever their values are.

    Raises:
        UnsupportedModelError: an operation holds a graph that can't be looked at, or graphs lie too deep in each other.
    """
    return tuple(_Fingerprints(leaves, norms).of(graph))


class _Fingerprints:
    """Fingerprints of operations, by their names, filled in graph by graph."""

    def __init__(self, leaves: Mapping[str, Leaf], norms: Collection[str]) -> None:
        self._leaves = leaves
        self._norms = norms
        self._known: dict[str, str] = {}

    def of(
        self, graph: ov.Model, roles: Mapping[str, str] | None = None, within: str = "", depth: int = 0
    ) -> Iterator[Operation]:
        """The operations of a graph that its outputs and states depend on.

        Args:
            roles: for a graph inside an operation, what each of its parameters is fed with, by their names.
            within: the friendly names of the operations that it lies in.
        """
        check_depth(within, depth)
        nodes = graph.get_ordered_ops()
        weights = {node.get_name(): dict(_leaves_read(node, self._leaves)) for node in nodes}
        sources = {node.get_name(): _sources(node, weights[node.get_name()]) for node in nodes}
        needed = _reached(nodes, sources)
        for node in nodes:
            name, friendly = node.get_name(), within + node.get_friendly_name()
            if name not in needed:
                continue
            inside = ports(node)
            for body in inside:
                yield from self.of(body.graph, body.roles, f"{friendly}/", depth + 1)
            if not within and friendly in self._norms and node.get_type_name() == "Constant":
                content = f"norm {friendly} {type_name(node)} {tuple(node.get_output_shape(0))}"
            else:
                content = _content(node, weights[name], self._known, roles) + self._inside(inside)
            self._known[name] = hashlib.sha256(content.encode()).hexdigest()
            results = [self._known[end] for body in inside for end in body.ends]
            yield Operation(
                name=friendly,
                operation_type="Constant" if _constant_like(node) else node.get_type_name(),
                fingerprint=self._known[name],
                sources=(*(self._known[source] for source in sources[name]), *results),
            )

    def _inside(self, inside: tuple[Ports, ...]) -> str:
        """Of each graph inside an operation, what goes in and what comes out, in words."""
        lines = [
            (*sorted(body.roles.values()), *sorted(f"{role} {self._known[end]}" for end, role in body.outcomes))
            for body in inside
        ]
        return "".join(f"\n{line}" for line in lines)


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
        if operation.operation_type == "Constant"
    ]
    wiring = [operation.name for operation in changed if operation.operation_type != "Constant"]
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
        leaf = leaves.get(weight.name)
        if leaf is not None and (leaf.chains is None or weight.chain in leaf.chains):
            yield port, leaf


def _constant_like(node: Any) -> bool:
    """A Constant, or the ShapeOf of what has a known shape, which is as good as one."""
    operation_type = node.get_type_name()
    return operation_type == "Constant" or (
        operation_type == "ShapeOf" and bool(node.input_value(0).get_partial_shape().is_static)
    )


def _sources(node: Any, weights: Mapping[int, Leaf]) -> tuple[str, ...]:
    """The operations that a node reads, weights left out."""
    if _constant_like(node):
        return ()
    return tuple(value.get_node().get_name() for port, value in enumerate(node.input_values()) if port not in weights)


def _content(
    node: Any, weights: Mapping[int, Leaf], fingerprints: Mapping[str, str], roles: Mapping[str, str] | None
) -> str:
    """All that an operation is, in words, but for the graphs inside it.

    Args:
        roles: of the parameters of a graph inside an operation; elsewhere parameters and results have names.
    """
    operation_type = node.get_type_name()
    if _constant_like(node):
        element_type = type_name(node)
        if operation_type == "Constant":
            return f"Constant {element_type} {tuple(node.get_output_shape(0))} {bytes_digest(raw(node))}"
        shape = np.array(node.input_value(0).get_shape(), {"i64": np.int64, "i32": np.int32}[element_type])
        return f"Constant {element_type} {shape.shape} {bytes_digest(shape)}"
    inputs = [
        f"weight {weights[port].identity} {value.get_element_type().to_string()}"
        if port in weights
        else f"{fingerprints[value.get_node().get_name()]} {value.get_index()}"
        for port, value in enumerate(node.input_values())
    ]
    attributes = dict(node.get_attributes())
    if operation_type == "MatMul":
        for port, name in enumerate(("transpose_a", "transpose_b")):
            if port in weights and weights[port].transposed:
                attributes[name] = not attributes[name]
    names = sorted(node.output(0).get_names()) if operation_type in ("Parameter", "Result") and roles is None else []
    if operation_type == "Parameter" and roles is not None:
        names = [roles[node.get_name()]]
    version = node.get_type_info().version_id
    return "\n".join((f"{operation_type} {version}", f"{sorted(attributes.items(), key=str)} {names}", *inputs))


def _reached(nodes: list[Any], sources: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Names of the operations that outputs and states depend on."""
    needed: set[str] = set()
    for node in reversed(nodes):
        name = node.get_name()
        if name in needed or node.get_type_name() in ("Result", "Assign", "Parameter"):
            needed.add(name)
            needed.update(sources[name])
    return needed
