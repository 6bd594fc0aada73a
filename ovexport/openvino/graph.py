"""Reading the graph of an IR: which weights it has, how each is stored, who uses it. Needs openvino and NumPy only."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovexport.artifacts import IR
from ovexport.errors import ArtifactError, UnsupportedModelError, last_line
from ovexport.foreign import exhausted
from ovexport.storage.bounded import MOST_NESTED_GRAPHS, MOST_UNPACKING, check_xml

FLOAT_TYPES = {"f32", "f16", "bf16", "f64"}
PACKED_TYPES = {"u4", "i4", "u8", "i8", "nf4", "f4e2m1", "u2", "f8e4m3", "f8e5m2"}
STORED_AS = {
    "f64": np.float64,
    "f32": np.float32,
    "f16": np.float16,
    "bf16": np.uint16,
    "u8": np.uint8,
    "i8": np.int8,
}
WITH_BODIES = {"If", "Loop", "TensorIterator"}
"""Operations that hold graphs of their own."""

_LOOK_THROUGH = {"Convert", "Reshape", "Transpose"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A weight matrix of the graph and its decompression subgraph.

    Attributes:
        name: friendly name of the constant that holds the codes (or the floats).
        element_type: of that constant, as OpenVINO writes it: "u4", "i4", "u8", "bf16", …
        shape: of that constant: (output, groups, group) or (output, input) when packed.
        codes, scale, zero_point: the constants; scale and zero_point None where there is none.
        chain: the operations from the constants to the users, as `describe` writes them.
        consumers: operation types that use the matrix: "MatMul", "Gather".
        consumer_names: their friendly names.
    """

    name: str
    element_type: str
    shape: tuple[int, ...]
    codes: Any
    scale: Any
    zero_point: Any
    chain: str
    consumers: tuple[str, ...]
    consumer_names: tuple[str, ...]

    @property
    def layer_kind(self) -> Literal["linear", "embedding"]:
        """A matrix that some MatMul uses is a Linear, shared with an embedding or not."""
        return "linear" if "MatMul" in self.consumers else "embedding"

    @property
    def packed(self) -> bool:
        """Whether it is stored as codes with a scale."""
        return self.element_type in PACKED_TYPES and self.scale is not None

    @property
    def bits(self) -> int:
        """Bits of a code, or of a float."""
        return int(self.codes.get_output_element_type(0).bitwidth)

    @property
    def elements(self) -> int:
        """Entries of the matrix."""
        return int(np.prod(self.shape))

    @property
    def in_features(self) -> int:
        """Terms of the dot products it is used in, when stored as (output, …)."""
        return self.elements // self.shape[0]

    @property
    def group_size(self) -> int:
        """Entries that share a scale."""
        return self.elements // int(np.prod(self.scale.get_output_shape(0))) if self.scale is not None else 0

    @property
    def byte_size(self) -> int:
        """Bytes of codes, scales and zero points in the .bin."""
        nodes = (self.codes, self.scale, self.zero_point)
        return sum(constant_bytes(node) for node in nodes if node is not None)


def read_graph(ir: IR, core: ov.Core | None = None) -> ov.Model:
    """Read an IR's graph, its weights memory-mapped.

    Raises:
        ArtifactError: it is missing, truncated or no IR.
    """
    return read_xml(ir.require().xml, core)


def read_xml(path: Path, core: ov.Core | None = None) -> ov.Model:
    """Read a graph by the path of its .xml.

    Raises:
        ArtifactError: as read_graph.
    """
    try:
        check_xml(path)
        graph = (core or ov.Core()).read_model(path)
        for _ in walk(graph):
            pass  # a friendly name that is no UTF-8 can't be asked for later either
    except (RuntimeError, OSError, ValueError) as error:
        raise exhausted(error, str(path)) or ArtifactError(
            f"{path}: not a readable OpenVINO IR ({last_line(error)}); make it again"
        ) from error
    return graph


def bodies(operation: Any) -> tuple[ov.Model, ...]:
    """The graphs inside an operation: the two branches of an If, the body of a Loop or TensorIterator.

    Raises:
        UnsupportedModelError: they can't be looked at.
    """
    operation_type = operation.get_type_name()
    if operation_type not in WITH_BODIES:
        return ()
    if not hasattr(operation, "get_function"):
        name = operation.get_friendly_name()
        raise UnsupportedModelError(f"{name}: the graph inside this {operation_type} can't be read")
    if operation_type == "If":
        return tuple(operation.get_function(index) for index in (0, 1))
    return (operation.get_function(),)


def walk(graph: ov.Model, within: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every operation with its friendly name, in the order of execution; one inside another's body is named
    `OUTER/INNER` and comes before that other.

    Raises:
        UnsupportedModelError: graphs lie in each other too deep, or can't be looked at.
    """
    check_depth(within, depth)
    for operation in graph.get_ordered_ops():
        name = within + str(operation.get_friendly_name())
        for body in bodies(operation):
            yield from walk(body, f"{name}/", depth + 1)
        yield name, operation


def check_depth(within: str, depth: int) -> None:
    """Refuse a graph that lies too deep in others.

    Raises:
        UnsupportedModelError: it does.
    """
    if depth > MOST_NESTED_GRAPHS:
        raise UnsupportedModelError(f"{within.rstrip('/')}: more than {MOST_NESTED_GRAPHS} graphs inside each other")


def weights(graph: ov.Model) -> tuple[Weight, ...]:
    """Every weight matrix that a MatMul or a Gather reads, in the order of execution, each once.

    Codes that are read in two ways, or through two scales or zero points, are two weights of one name.
    """
    by_parts: dict[tuple[str, ...], Weight] = {}
    for name, operation in walk(graph):
        for _, weight in weight_inputs(operation):
            parts = (weight.codes, weight.scale, weight.zero_point)
            key = (*("" if part is None else str(part.get_name()) for part in parts), weight.chain)
            known = by_parts.get(key)
            by_parts[key] = replace(
                weight,
                consumers=(*(known.consumers if known else ()), operation.get_type_name()),
                consumer_names=(*(known.consumer_names if known else ()), name),
            )
    return tuple(by_parts.values())


def stray_readers(graph: ov.Model) -> list[str]:
    """Readers of a packed weight's codes, scale or zero point, or of what is computed from them, beside the MatMuls and
    Gathers that read the weight whole: "WEIGHT, read by OPERATION"."""
    whole: set[tuple[str, int]] = set()
    parts: dict[str, tuple[str, Any]] = {}
    operations = list(walk(graph))
    for _, operation in operations:
        for port, weight in weight_inputs(operation):
            if weight.packed:
                whole.add((operation.get_name(), port))
                parts |= {
                    node.get_name(): (weight.name, node)
                    for node in _upstream(operation.input_value(port).get_node())
                    if type_name(node) not in ("i64", "i32")
                }
    return [
        f"{weight}, read by {target.get_node().get_friendly_name()}"
        for weight, node in parts.values()
        for output in node.outputs()
        for target in output.get_target_inputs()
        if target.get_node().get_name() not in parts
        and (target.get_node().get_name(), target.get_index()) not in whole
        and target.get_node().get_type_name() != "ShapeOf"
    ]


def _upstream(node: Any) -> list[Any]:
    """An operation and all that it comes from, each once; more than a weight's unpacking takes are not gone through."""
    nodes: dict[str, Any] = {}
    waiting = [node]
    while waiting and len(nodes) <= MOST_UNPACKING:
        one = waiting.pop()
        if one.get_name() not in nodes:
            nodes[one.get_name()] = one
            waiting += [value.get_node() for value in one.input_values()]
    return list(nodes.values())


def weight_inputs(operation: Any) -> Iterator[tuple[int, Weight]]:
    """The ports of a MatMul or Gather that read a weight matrix, with the matrix as `decompression` finds it."""
    operation_type = operation.get_type_name()
    ports = {"MatMul": (0, 1), "Gather": (0,)}.get(operation_type, ())
    for port in ports:
        source = operation.input_value(port)
        shape = source.get_partial_shape()
        if shape.is_dynamic or len(shape) != 2:
            continue
        if operation_type == "Gather" and source.get_element_type().to_string() not in FLOAT_TYPES:
            continue
        weight = decompression(source)
        if weight is not None:
            yield port, weight


def decompression(source: ov.Output) -> Weight | None:
    """Match `Constant → Convert [→ Subtract] → Multiply [→ Reshape → Convert]`, or a plain float constant.

    Returns:
        The weight without consumers; None when the source does not come from a constant in this way, or by way of more
        operations than any weight's unpacking has.
    """
    node = _through(source.get_node())
    scale = zero_point = None
    if node.get_type_name() == "Multiply":
        scale = _constant(node.input_value(1))
        node = _through(node.input_value(0).get_node())
        if node.get_type_name() == "Subtract":
            zero_point = _constant(node.input_value(1))
            node = _through(node.input_value(0).get_node())
        if scale is None:
            return None
    if node.get_type_name() != "Constant" or _unpacked_by_too_many(source.get_node()):
        return None
    return Weight(
        name=node.get_friendly_name(),
        element_type=type_name(node),
        shape=tuple(node.get_output_shape(0)),
        codes=node,
        scale=scale,
        zero_point=zero_point,
        chain=describe(source.get_node()),
        consumers=(),
        consumer_names=(),
    )


def describe(node: Any) -> str:
    """An operation and all that it comes from, in words: types, attributes, shapes, values of index constants.

    Raises:
        ArtifactError: it comes from more operations than any weight's unpacking has.
    """
    if _unpacked_by_too_many(node):
        raise ArtifactError(
            f"{node.get_friendly_name()}: unpacked by more than {MOST_UNPACKING} operations, as no weight is; make the "
            "IR again"
        )
    return _in_words(node)


def _unpacked_by_too_many(node: Any) -> bool:
    """Whether an operation comes from more than MOST_UNPACKING others, each counted as often as it is reached."""
    count, waiting = 0, [node]
    while waiting and count <= MOST_UNPACKING:
        count += 1
        waiting += [value.get_node() for value in waiting.pop().input_values()]
    return count > MOST_UNPACKING


def _in_words(node: Any) -> str:
    if node.get_type_name() == "Constant":
        element_type, shape = type_name(node), tuple(node.get_output_shape(0))
        values = f" {node.data.tolist()}" if element_type in ("i64", "i32") else ""
        return f"{element_type} {shape}{values}"
    sources = ", ".join(_in_words(value.get_node()) for value in node.input_values())
    attributes = sorted(node.get_attributes().items(), key=str)
    return f"{node.get_type_name()} {node.get_type_info().version_id} {attributes} ({sources})"


def runtime_options(graph: ov.Model) -> dict[str, str]:
    """What the IR tells the runtime to do, such as the precision of the KV cache."""
    if not graph.has_rt_info(["runtime_options"]):
        return {}
    options = graph.get_rt_info(["runtime_options"]).value
    return {str(name): str(getattr(option, "value", option)) for name, option in dict(options).items()}


def constants(graph: ov.Model) -> Iterator[Any]:
    """The Constant operations of a graph and of the graphs inside it."""
    return (node for _, node in walk(graph) if node.get_type_name() == "Constant")


def type_name(node: Any) -> str:
    """Element type of an operation's first output: "f32", "u4", …"""
    return str(node.get_output_element_type(0).to_string())


def constant_bytes(node: Any) -> int:
    """Bytes a constant takes in the .bin."""
    bits = int(node.get_output_element_type(0).bitwidth)
    return -(-int(np.prod(node.get_output_shape(0))) * bits // 8)


def raw(node: Any) -> NDArray[np.uint8]:
    """A constant's bytes, one dimension.

    Raises:
        ArtifactError: they are not as many as its type and shape take.
    """
    data: NDArray[Any] = node.data
    values = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    if len(values) != constant_bytes(node):
        raise ArtifactError(
            f"constant {node.get_friendly_name()}: {len(values)} bytes where its type and shape take "
            f"{constant_bytes(node)}; the IR is corrupt, make it again"
        )
    return values


def nibbles(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The 4-bit values of packed bytes, low nibble first, one to a byte."""
    values = np.empty(2 * len(packed), dtype=np.uint8)
    np.bitwise_and(packed, 0x0F, out=values[0::2])
    np.right_shift(packed, 4, out=values[1::2])
    return values


def unpacked(node: Any) -> NDArray[Any]:
    """A constant's values in its shape; 4-bit codes one to a byte, uint8 for u4 and int8 for i4.

    Raises:
        ArtifactError: its bytes are not as many as its type and shape take, or the type is none that weights have.
    """
    shape, element_type, values = tuple(node.get_output_shape(0)), type_name(node), raw(node)
    if element_type in ("u4", "i4"):
        codes = nibbles(values)[: int(np.prod(shape))].reshape(shape)
        return codes if element_type == "u4" else ((codes ^ 8).astype(np.int8) - 8)
    if element_type not in STORED_AS:
        raise ArtifactError(f"constant {node.get_friendly_name()}: holds {element_type}, which no weight of ours has")
    stored = values.view(STORED_AS[element_type]).reshape(shape)
    return (stored.astype(np.uint32) << 16).view(np.float32) if element_type == "bf16" else stored


def _through(node: Any) -> Any:
    """What is converted, reshaped or transposed, by constants, to this."""
    while node.get_type_name() in _LOOK_THROUGH and all(
        value.get_node().get_type_name() == "Constant" for value in node.input_values()[1:]
    ):
        node = node.input_value(0).get_node()
    return node


def _constant(source: ov.Output) -> Any:
    node = _through(source.get_node())
    return node if node.get_type_name() == "Constant" else None
