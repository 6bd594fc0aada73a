"""Stage convert: the IR of the uncompressed model with its weights replaced by packed decompression subgraphs.

Nothing but weights changes, so the product, its plain twin and the baseline are one graph. A constant is known by the
digest of its bytes, not by its name: what is replaced is the very weight that was tuned.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as opset

from ovexport.artifacts import IR, LayerFormat, PackedWeights, atomic_folder, bytes_digest
from ovexport.errors import UnsupportedModelError
from ovexport.graph import constants, raw, read_graph, type_name
from ovexport.tensorfile import TensorFile

_OPENVINO_TYPES = {"int4_asym": ov.Type.u4, "int4_sym": ov.Type.i4, "int8_asym": ov.Type.u8}
_FLOATS = {"f32": np.float32, "f16": np.float16}


def convert(base: IR, packed: PackedWeights, out: Path) -> IR:
    """Write the IR of the packed weights.

    Args:
        base: the IR of the uncompressed model; its graph, tokenizers and configurations are taken over.

    Raises:
        ArtifactError: an input is missing or corrupt.
        UnsupportedModelError: a weight is not in the graph as it is in the model, or is used in an unknown way.
    """
    manifest = packed.manifest
    tensors = packed.tensors
    graph = read_graph(base)
    found = _constants_by_digest(graph, manifest.layers)
    for layer in manifest.layers:
        if layer.mode == "float" and layer.name not in manifest.changed:
            continue
        nodes = found.get(manifest.weight_digests[layer.name], [])
        node = _one_of(nodes, layer)
        if layer.mode == "float":
            _replace_floats(node, tensors.require(layer.name))
        else:
            _replace(node, layer, tensors)
    graph.validate_nodes_and_infer_types()
    with atomic_folder(out) as folder:
        ov.save_model(graph, folder / "openvino_model.xml", compress_to_fp16=False)
        for file in base.path.iterdir():
            if file.is_file() and not file.name.startswith("openvino_model."):
                shutil.copy2(file, folder / file.name)
    return IR(out)


def _constants_by_digest(graph: ov.Model, layers: tuple[LayerFormat, ...]) -> dict[str, list[Any]]:
    """The graph's constants by the digest of their matrix as (output, input)."""
    straight = {(layer.out_features, layer.in_features) for layer in layers}
    flipped = {(layer.in_features, layer.out_features) for layer in layers if layer.transposed}
    found: dict[str, list[Any]] = {}
    for node in constants(graph):
        shape = tuple(node.get_output_shape(0))
        if shape in straight:
            found.setdefault(bytes_digest(raw(node)), []).append(node)
        if shape in flipped:
            found.setdefault(bytes_digest(_flipped_bytes(node)), []).append(node)
    return found


def _flipped_bytes(node: Any) -> NDArray[np.uint8]:
    rows, columns = node.get_output_shape(0)
    width = int(node.get_output_element_type(0).size)
    return np.ascontiguousarray(raw(node).reshape(rows, columns, width).transpose(1, 0, 2)).reshape(-1)


def _one_of(nodes: list[Any], layer: LayerFormat) -> Any:
    """The constant of a layer; where several hold the same values, the one that has the layer's name."""
    module = layer.name.removesuffix(".weight")
    if len(nodes) > 1:
        nodes = [node for node in nodes if module in node.get_friendly_name().split("self.")[-1]]
    if len(nodes) != 1:
        raise UnsupportedModelError(
            f"{layer.name}: {len(nodes)} constants of the traced graph hold this layer's weights, where one should; "
            "add the layer to compress.ignored"
        )
    return nodes[0]


def _replace(node: Any, layer: LayerFormat, tensors: TensorFile) -> None:
    output = _converted(node)
    matrix = _decompression(layer, tensors, output.get_element_type())
    stored_as_input_output = tuple(node.get_output_shape(0)) != (layer.out_features, layer.in_features) or (
        layer.transposed and _flips(output)
    )
    for target in output.get_target_inputs():
        if not stored_as_input_output:
            target.replace_source_output(matrix)
            continue
        _flip_matmul(target, matrix, layer)


def _flips(output: ov.Output) -> bool:
    """Whether a square matrix is read as (input, output), that is, by a MatMul that does not transpose it."""
    users = [target.get_node() for target in output.get_target_inputs()]
    return all(user.get_type_name() == "MatMul" and not user.get_attributes()["transpose_b"] for user in users)


def _flip_matmul(target: Any, matrix: ov.Output, layer: LayerFormat) -> None:
    """Let a MatMul that read the matrix as (input, output) read it as (output, input)."""
    user = target.get_node()
    if user.get_type_name() != "MatMul" or target.get_index() != 1:
        raise UnsupportedModelError(
            f"{layer.name}: read as (input, output) by a {user.get_type_name()}; add it to compress.ignored"
        )
    attributes = user.get_attributes()
    flipped = opset.matmul(
        user.input_value(0), matrix, attributes["transpose_a"], not attributes["transpose_b"]
    )
    flipped.set_friendly_name(user.get_friendly_name())
    for reader in user.output(0).get_target_inputs():
        reader.replace_source_output(flipped.output(0))


def _converted(node: Any) -> ov.Output:
    """The matrix in the type it is used in: behind the Convert of a 16-bit constant, else the constant itself."""
    readers = node.output(0).get_target_inputs()
    users = [reader.get_node() for reader in readers]
    if len(users) == 1 and users[0].get_type_name() == "Convert":
        return users[0].output(0)
    return node.output(0)


def _decompression(layer: LayerFormat, tensors: TensorFile, result_type: ov.Type) -> ov.Output:
    """Codes → Convert f16 [→ Subtract zero point] → Multiply scale [→ Reshape] → Convert, as NNCF's DQ format has it."""
    kind = _OPENVINO_TYPES[layer.mode]
    rows, columns, groups = layer.out_features, layer.in_features, layer.groups
    grid = (rows, groups, 1) if groups > 1 else (rows, 1)
    shape = (rows, groups, layer.group_size) if groups > 1 else (rows, columns)
    codes = _constant(tensors.require(f"{layer.name}.codes"), shape, kind, layer.name)
    result = opset.convert(codes, "f16")
    if layer.mode != "int4_sym":
        zero_point = _constant(tensors.require(f"{layer.name}.zero_point"), grid, kind, f"{layer.name}/zero_point")
        result = opset.subtract(result, opset.convert(zero_point, "f16"))
    scale = _constant(tensors.require(f"{layer.name}.scale"), grid, ov.Type.f16, f"{layer.name}/scale")
    result = opset.multiply(result, scale)
    if groups > 1:
        result = opset.reshape(result, np.array([rows, columns], dtype=np.int64), special_zero=False)
    result = opset.convert(result, result_type)
    result.set_friendly_name(f"{layer.name}/dequantized")
    return result.output(0)


def _constant(values: NDArray[Any], shape: tuple[int, ...], kind: ov.Type, name: str) -> Any:
    tensor = ov.Tensor(np.array(values).reshape(-1), ov.Shape(shape), kind)
    node = ov.op.Constant(tensor, shared_memory=False)  # by default it would keep a pointer to freed memory
    node.set_friendly_name(name)
    return node


def _replace_floats(node: Any, values: NDArray[np.float32]) -> None:
    kind = type_name(node)
    if kind == "bf16":
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        tensor = ov.Tensor(rounded.reshape(-1), ov.Shape(values.shape), ov.Type.bf16)
        new = ov.op.Constant(tensor, shared_memory=False)
    else:
        new = opset.constant(values.astype(_FLOATS[kind]))
    new.set_friendly_name(node.get_friendly_name())
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(new.output(0))
