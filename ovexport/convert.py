"""Stage convert: the IR of the uncompressed model with its weights replaced by packed decompression subgraphs.

Nothing but weights changes, so the product, its plain twin and the baseline are one graph. A constant is known by the
digest of its bytes and its shape: what is replaced is the very weight that was tuned.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as opset

from ovexport.artifacts import ADAPTER_FOLDER, IR, IR_MANIFEST, IRManifest, PackedWeights
from ovexport.errors import UnsupportedModelError
from ovexport.openvino.graph import read_graph, type_name
from ovexport.openvino.matrices import Matrix, bfloat16_bits
from ovexport.openvino.norms import norm_constants
from ovexport.openvino.weight_index import indexed_matrices
from ovexport.storage.digests import file_digest
from ovexport.storage.files import atomic_folder, files_in
from ovexport.storage.records import write_record
from ovexport.storage.tensorfile import TensorFile
from ovexport.versions import stack_versions
from ovexport.weights.layer import LayerFormat


def convert(base: IR, packed: PackedWeights, out: Path) -> IR:
    """Write the IR of the packed weights.

    Args:
        base: the traced IR of the uncompressed model, with its index of weights; its graph, tokenizers and
            configurations are taken over.

    Raises:
        ArtifactError: an input is missing or corrupt.
        UnsupportedModelError: a weight is not in the graph as it is in the model, or is used in an unknown way.
    """
    manifest = packed.manifest
    tensors = packed.tensors
    graph = read_graph(base)
    matrices = indexed_matrices(base, graph, manifest)
    for layer in manifest.layers:
        if layer.encoding is None and layer.name not in manifest.replaced_weights:
            continue
        matrix = matrices.get(layer.name)
        if matrix is None:
            raise UnsupportedModelError(
                f"{layer.name}: no constant of the traced graph holds this layer's weights; add it to compress.ignored"
            )
        if layer.encoding is None:
            _replace_floats(matrix, tensors.require(layer.name))
        else:
            _replace(matrix, layer, tensors)
    constants = norm_constants(graph, [norm.name for norm in manifest.norms])
    for norm in manifest.norms:
        _replace_norm(constants[norm.name], tensors.require(norm.name) + np.float32(norm.added))
    graph.validate_nodes_and_infer_types()
    return _write(graph, base, packed, out)


def _write(graph: ov.Model, base: IR, packed: PackedWeights, out: Path) -> IR:
    """Write the product: its graph, the adapter that goes with it, and what stands beside the base's."""
    manifest = packed.manifest
    with atomic_folder(out) as folder:
        ov.save_model(graph, folder / "openvino_model.xml", compress_to_fp16=False)
        shutil.copytree(
            base.path, folder, ignore=shutil.ignore_patterns("openvino_model.*", IR_MANIFEST), dirs_exist_ok=True
        )
        if packed.adapter is not None:
            shutil.copytree(packed.adapter, folder / ADAPTER_FOLDER)
        record = IRManifest(
            model_id=manifest.model_id,
            revision=manifest.revision,
            adapter=manifest.adapter,
            checkpoint_files=manifest.checkpoint_files,
            tuning_steps=manifest.tuning_steps,
            norms=tuple(norm.name for norm in manifest.norms),
            files={file.relative_to(folder).as_posix(): file_digest(file) for file in files_in(folder)},
            versions=stack_versions(),
        )
        write_record(record, folder / IR_MANIFEST)
    return IR(out)


def _replace(matrix: Matrix, layer: LayerFormat, tensors: TensorFile) -> None:
    output = _converted(matrix.node)
    packed = decompression(layer, tensors, output.get_element_type())
    for target in output.get_target_inputs():
        if target.get_node().get_type_name() == "ShapeOf":
            _replace_shape(target.get_node())
        elif matrix.transposed:
            _flip_matmul(target, packed, layer)
        else:
            target.replace_source_output(packed)


def _replace_shape(node: Any) -> None:
    """A weight's shape as a constant: for a ShapeOf of it, the runtime would keep the weight in floating point."""
    shape = opset.constant(np.array(node.input_value(0).get_shape()), node.get_output_element_type(0))
    shape.set_friendly_name(node.get_friendly_name())
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(shape.output(0))


def _flip_matmul(target: Any, matrix: ov.Output, layer: LayerFormat) -> None:
    """Let a MatMul that read the matrix as (input, output) read it as (output, input)."""
    user = target.get_node()
    if user.get_type_name() != "MatMul" or target.get_index() != 1:
        raise UnsupportedModelError(
            f"{layer.name}: read as (input, output) by a {user.get_type_name()}; add it to compress.ignored"
        )
    attributes = user.get_attributes()
    flipped = opset.matmul(user.input_value(0), matrix, attributes["transpose_a"], not attributes["transpose_b"])
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


def decompression(layer: LayerFormat, tensors: TensorFile, result_type: ov.Type) -> ov.Output:
    """Codes → Convert f16 [→ Subtract zero point] → Multiply scale [→ Reshape] → Convert: NNCF's DQ format.

    Every node has a name of its own: one that OpenVINO makes up counts all nodes that the process made so far, and the
    same product would be other bytes.
    """
    encoding = layer.require_encoding()
    code_type = getattr(ov.Type, encoding.element_type)
    rows, columns, groups = layer.out_features, layer.in_features, layer.groups
    grid = (rows, groups, 1) if groups > 1 else (rows, 1)
    shape = (rows, groups, layer.group_size) if groups > 1 else (rows, columns)
    codes = _constant(tensors.require(f"{layer.name}.codes"), shape, code_type, layer.name)
    result = opset.convert(codes, "f16", name=f"{layer.name}/converted")
    if not encoding.symmetric:
        zero_type = getattr(ov.Type, encoding.zero_point_type)
        zero_point = _constant(tensors.require(f"{layer.name}.zero_point"), grid, zero_type, f"{layer.name}/zero_point")
        if zero_type != ov.Type.f16:
            zero_point = opset.convert(zero_point, "f16", name=f"{layer.name}/zero_point/converted")
        result = opset.subtract(result, zero_point, name=f"{layer.name}/shifted")
    scale = _constant(tensors.require(f"{layer.name}.scale"), grid, ov.Type.f16, f"{layer.name}/scale")
    result = opset.multiply(result, scale, name=f"{layer.name}/scaled")
    if groups > 1:
        whole = opset.constant(np.array([rows, columns], dtype=np.int64), name=f"{layer.name}/shape")
        result = opset.reshape(result, whole, special_zero=False, name=f"{layer.name}/reshaped")
    return opset.convert(result, result_type, name=f"{layer.name}/dequantized").output(0)


def _constant(values: NDArray[Any], shape: tuple[int, ...], element_type: ov.Type, name: str) -> Any:
    """A constant that points into the file of packed weights, which stays mapped as long as its TensorFile lives."""
    node = ov.op.Constant(ov.Tensor(values.reshape(-1), ov.Shape(shape), element_type), shared_memory=True)
    node.set_friendly_name(name)
    return node


def _replace_floats(matrix: Matrix, values: NDArray[np.float32]) -> None:
    """Replace a float constant by other floats of its type."""
    node = matrix.node
    stored = matrix.stored(values)
    if type_name(node) == "bf16":
        bits = bfloat16_bits(stored)
        replaced = ov.op.Constant(ov.Tensor(bits.reshape(-1), ov.Shape(bits.shape), ov.Type.bf16), False)
    else:
        replaced = opset.constant(stored.astype({"f32": np.float32, "f16": np.float16}[type_name(node)]))
    _take_place(replaced, node)


def _replace_norm(node: Any, values: NDArray[np.float32]) -> None:
    """Replace a float32 constant by other values, in its shape."""
    _take_place(opset.constant(values.reshape(node.get_output_shape(0))), node)


def _take_place(replaced: Any, node: Any) -> None:
    """Let all that reads a constant read another one, of the same name."""
    replaced.set_friendly_name(node.get_friendly_name())
    for target in node.output(0).get_target_inputs():
        target.replace_source_output(replaced.output(0))
