"""Which constant of a traced graph holds which weight matrix of the model. Needs openvino and NumPy only.

A constant is known by the digest of its bytes together with its shape. Where several hold equal values, as those of
zero-initialised blocks do, the names that the tracer gave them tell them apart.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovexport.artifacts import CheckpointManifest, PackedManifest
from ovexport.errors import UnsupportedModelError
from ovexport.openvino.graph import FLOAT_TYPES, STORED_AS, constants, raw, type_name
from ovexport.storage.digests import bytes_digest
from ovexport.weights.layer import LayerFormat, WeightMatrix

Content = tuple[str, int, int]
"""SHA-256 of a matrix's bytes row by row as (output, input), outputs and inputs."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A constant that holds a known matrix; `transposed` when it is stored as (input, output)."""

    node: Any
    transposed: bool

    def reader(self) -> Callable[[slice], NDArray[np.float32]]:
        """Reads the values of some rows, (rows, input) float32, a copy each time."""
        element_type, shape = type_name(self.node), tuple(self.node.get_output_shape(0))
        stored = raw(self.node).view(STORED_AS[element_type]).reshape(shape)
        matrix = stored.T if self.transposed else stored

        def read(rows: slice) -> NDArray[np.float32]:
            if element_type == "bf16":
                return np.left_shift(matrix[rows], 16, dtype=np.uint32, order="C").view(np.float32)
            return matrix[rows].astype(np.float32, order="C")

        return read

    def stored(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Other values, (output, input), in the layout of this constant."""
        return np.ascontiguousarray(values.T if self.transposed else values)

    def rounded(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Other values in the type of this constant, as float32."""
        element_type = type_name(self.node)
        if element_type == "bf16":
            return (bfloat16_bits(values).astype(np.uint32) << 16).view(np.float32)
        return values.astype(STORED_AS[element_type]).astype(np.float32)


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The nearest bfloat16 values, ties to even, as their bits."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def layer_matrices(graph: ov.Model, manifest: CheckpointManifest | PackedManifest) -> dict[str, Matrix]:
    """By layer, the one constant of the traced graph that holds its weights.

    Layers whose weights are not in the graph are left out; so are those that stay as they are and have no constant of
    their own.

    Raises:
        UnsupportedModelError: which constant is a layer's can't be told, or several layers share one.
    """
    return choose_matrices(manifest, matrices_by_content(graph, manifest.layers))


def choose_matrices(
    manifest: CheckpointManifest | PackedManifest, by_content: Mapping[Content, list[Matrix]]
) -> dict[str, Matrix]:
    """As layer_matrices, from constants whose content is known."""
    candidates = {
        layer.name: by_content.get((manifest.weight_digests[layer.name], layer.out_features, layer.in_features), [])
        for layer in manifest.layers
    }
    chosen = {layer.name: own for layer in manifest.layers if (own := _named(layer, candidates[layer.name]))}
    taken = {matrix.node.get_name(): name for name, matrix in chosen.items()}
    replaced = {layer.name for layer in manifest.layers if layer.encoding} | set(manifest.replaced_weights)
    for layer in manifest.layers:
        if layer.name in chosen or not candidates[layer.name]:
            continue
        free = _one_way(layer, [matrix for matrix in candidates[layer.name] if matrix.node.get_name() not in taken])
        if len(free) == 1:
            chosen[layer.name] = free[0]
            taken[free[0].node.get_name()] = layer.name
            continue
        sharing = {taken.get(matrix.node.get_name(), "") for matrix in candidates[layer.name]}
        if {layer.name, *sharing} & replaced:
            raise _ambiguous(layer, candidates[layer.name], sorted(sharing - {""}))
    return chosen


def _named(layer: LayerFormat, candidates: list[Matrix]) -> Matrix | None:
    """The one candidate that the tracer named after the layer, itself or what reads it."""
    module = layer.name.removesuffix(".weight")
    for prefix, names in ((f"self.{module}.", _own_name), (f"__module.{module}/", _reader_names)):
        own = [one for one in candidates if any(name.startswith(prefix) for name in names(one.node))]
        if len(own := _one_way(layer, own)) == 1:
            return own[0]
    return None


def _own_name(node: Any) -> list[str]:
    return [str(node.get_friendly_name())]


def _reader_names(node: Any) -> list[str]:
    return [str(target.get_node().get_friendly_name()) for target in _readers(node)]


def _readers(node: Any) -> list[Any]:
    """The inputs that read a constant, through the Convert that widens a 16-bit one."""
    targets = [target for output in node.outputs() for target in output.get_target_inputs()]
    return [
        reader
        for target in targets
        for reader in (_readers(target.get_node()) if target.get_node().get_type_name() == "Convert" else [target])
    ]


def _one_way(layer: LayerFormat, candidates: list[Matrix]) -> list[Matrix]:
    """The candidates, a constant that equals its transpose only in the way that it is read."""
    nodes = [matrix.node.get_name() for matrix in candidates]
    return [
        matrix
        for matrix in candidates
        if nodes.count(matrix.node.get_name()) == 1 or matrix.transposed == _is_read_transposed(matrix.node, layer)
    ]


def _is_read_transposed(node: Any, layer: LayerFormat) -> bool:
    """Whether a MatMul reads a constant as (input, output); as the layer has it where none reads it straight away."""
    for target in _readers(node):
        user = target.get_node()
        if user.get_type_name() == "MatMul":
            first = target.get_index() == 0
            return bool(user.get_attributes()["transpose_a" if first else "transpose_b"] == first)
    return layer.transposed


def _ambiguous(layer: LayerFormat, candidates: list[Matrix], sharing: list[str]) -> UnsupportedModelError:
    if sharing:
        others = ", ".join(sharing[:3]) + (f" and {len(sharing) - 3} more" if len(sharing) > 3 else "")
        return UnsupportedModelError(
            f"{layer.name}: its weights equal those of {others}, and the traced graph computes both at once; "
            "add all of them to compress.ignored, or give the model in bfloat16"
        )
    count = len({matrix.node.get_name() for matrix in candidates})
    return UnsupportedModelError(
        f"{layer.name}: {count} constants of the traced graph hold this layer's weights, and none has its name; "
        "add the layer to compress.ignored"
    )


def matrices_by_content(graph: ov.Model, layers: Iterable[LayerFormat | WeightMatrix]) -> dict[Content, list[Matrix]]:
    """The graph's float constants with a layer's shape, hashed.

    A constant that the exporter widened to float32 is found under the digest of the 16-bit values it came from too.
    """
    layers = tuple(layers)
    straight = {(layer.out_features, layer.in_features) for layer in layers}
    transposed = {(layer.in_features, layer.out_features) for layer in layers if layer.transposed}
    matrices: dict[Content, dict[tuple[str, bool], Matrix]] = {}
    for node in constants(graph):
        shape = tuple(node.get_output_shape(0))
        if type_name(node) not in FLOAT_TYPES or shape not in straight | transposed:
            continue
        stored = raw(node).reshape(*shape, -1)
        for values in (stored, *_narrowed(node, stored)):
            if shape in straight:
                content = (bytes_digest(values), shape[0], shape[1])
                matrices.setdefault(content, {})[node.get_name(), False] = Matrix(node, transposed=False)
            if shape in transposed:
                content = (bytes_digest(np.ascontiguousarray(values.transpose(1, 0, 2))), shape[1], shape[0])
                matrices.setdefault(content, {})[node.get_name(), True] = Matrix(node, transposed=True)
    return {content: list(candidates.values()) for content, candidates in matrices.items()}


def _narrowed(node: Any, stored: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a float32 constant in each 16-bit type that holds its values exactly, (rows, columns, 2)."""
    if type_name(node) != "f32":
        return
    bits = stored.view(np.uint32)[..., 0]
    if not (bits & 0xFFFF).any():
        yield (bits >> 16).astype(np.uint16)[..., None].view(np.uint8)
    floats = bits.view(np.float32)
    with np.errstate(over="ignore"):
        halves = floats.astype(np.float16)
    if np.array_equal(halves.astype(np.float32), floats):
        yield halves[..., None].view(np.uint8)
