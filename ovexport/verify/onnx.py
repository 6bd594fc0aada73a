"""The proof of an ONNX product, read by OpenVINO: the codes are the checkpoint's, and the graph unpacks them as such.

Every matrix that a MatMul or Gather reads is computed from its constants by the runtime, entry by entry, and compared
with (code - zero point) · scale; no layout is taken for granted. Needs openvino and NumPy, neither onnx nor torch.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovexport.artifacts import IR, Checkpoint, CheckpointManifest
from ovexport.errors import ArtifactError, last_line
from ovexport.foreign import exhausted
from ovexport.openvino.graph import PACKED_TYPES, constant_bytes, type_name, unpacked, walk
from ovexport.openvino.runtime import ACCURATE, LogitsRunner, compile_for_cpu
from ovexport.reports import Check, VerificationReport, VerificationSummary
from ovexport.storage.digests import bytes_digest, file_digest
from ovexport.storage.files import files_in
from ovexport.verify.behaviour import MARGIN, UNIT_ROUNDOFF, behaviour
from ovexport.verify.checks import equal, zero
from ovexport.verify.files import as_made
from ovexport.verify.modes import predicted_bytes, storage
from ovexport.verify.norms import onnx_norms
from ovexport.versions import stack_versions
from ovexport.weights.layer import LayerFormat

ONNX_FILE = "model.onnx"


@dataclass(frozen=True, slots=True)
class _Reader:
    """A port of a MatMul or Gather that reads a matrix which no input of the model has a part in.

    Attributes:
        layers: names of the matrices that it comes from; all constants of a layer begin with its name.
        transposed: the matrix is read as (input, output).
    """

    operation: Any
    port: int
    layers: frozenset[str]
    transposed: bool

    @property
    def name(self) -> str:
        """Of the operation."""
        return str(self.operation.get_friendly_name())


def is_onnx_folder(path: Path) -> bool:
    """Whether a folder holds an ONNX product and no IR."""
    return (path / ONNX_FILE).is_file() and not (path / "openvino_model.xml").is_file()


def prove_onnx(folder: Path, checkpoint: Checkpoint, *, runtime: bool = True) -> VerificationReport:
    """The proof of an ONNX product by itself, as a report; its wiring is compared with nothing.

    Raises:
        ArtifactError, UnsupportedModelError: as `verify_onnx`.
    """
    checks = verify_onnx(folder, checkpoint, runtime=runtime)
    graph, manifest = _read(folder / ONNX_FILE), checkpoint.manifest
    readers = list(_readers(graph))
    constants = {str(node.get_friendly_name()): node for _, node in walk(graph) if node.get_type_name() == "Constant"}
    linear = [one for one in readers if one.operation.get_type_name() == "MatMul"]
    packed = {layer.name: layer for layer in manifest.packed}
    bits = Counter(storage(packed[name]).bits for one in linear for name in one.layers if name in packed)
    stored = [node for name, node in constants.items() if name.partition("/")[0] in packed]
    size = sum(constant_bytes(node) for node in stored)
    elements = sum(layer.out_features * layer.in_features for layer in manifest.packed)
    summary = VerificationSummary(
        linear_layers=len(linear),
        packed_int4=bits[4],
        packed_int8=bits[8],
        float=len(linear) - bits.total(),
        code_mismatches=None,
        scale_mismatches=None,
        zero_point_mismatches=None,
        adapter_nodes=next(int(check.value) for check in checks if check.name == "no adapter in the graph"),
        operators_beyond_twin=None,
        runtime_packed_linears=next(
            (int(check.value) for check in checks if check.name == "packed Linears run on packed weights"), None
        ),
        weight_bytes=size,
        predicted_weight_bytes=sum(predicted_bytes(layer) for layer in manifest.packed),
        bits_per_weight=8 * size / elements if elements else None,
        bytes_read_per_token=size,
        reason="an ONNX product: its operations are compared with no other graph's",
    )
    return VerificationReport(
        passed=all(check.passed for check in checks),
        subject=folder.absolute().name,
        checks=tuple(checks),
        summary=summary,
        layers=(),
        files={file.relative_to(folder).as_posix(): file_digest(file) for file in files_in(folder)},
        versions=stack_versions(),
    )


def verify_onnx(folder: Path, checkpoint: Checkpoint, *, runtime: bool = True) -> list[Check]:
    """Prove that an ONNX product is what a checkpoint's model was tuned to.

    Args:
        runtime: run it too, and look at what the CPU executes.

    Raises:
        ArtifactError: a file is missing or can't be read.
        UnsupportedModelError: the runtime can't compile it.
    """
    manifest = checkpoint.manifest
    graph = _read(folder / ONNX_FILE)
    readers = list(_readers(graph))
    constants = {str(node.get_friendly_name()): node for _, node in walk(graph) if node.get_type_name() == "Constant"}
    by_layer = {layer.name: [one for one in readers if layer.name in one.layers] for layer in manifest.packed}
    checks = as_made(IR(folder), checkpoint, None, None)
    for layer in manifest.packed:
        checks += _layer_checks(layer, manifest, constants, by_layer[layer.name])
    checks += onnx_norms(constants, manifest, checkpoint.adapters)
    checks.append(_no_strangers(readers, manifest))
    if runtime:
        packed = [one for ways in by_layer.values() for one in ways if one.operation.get_type_name() == "MatMul"]
        checks.append(_runs_packed(graph, len(packed)))
        if checkpoint.reference is not None:
            terms = sum(_terms(one) for one in packed)
            limit = MARGIN * UNIT_ROUNDOFF * float(np.sqrt(terms))
            checks += behaviour(LogitsRunner(graph, str(folder)), str(folder), limit, checkpoint.reference)
    return [check.with_values(subject=f"onnx: {check.subject}") for check in checks]


def _read(path: Path) -> ov.Model:
    if not path.is_file():
        raise ArtifactError(f"{path}: missing; give a folder that ovexport convert --format onnx wrote")
    try:
        return ov.Core().read_model(path)
    except RuntimeError as error:
        raise exhausted(error, str(path)) or ArtifactError(
            f"{path}: OpenVINO can't read it ({last_line(error)}); make it again"
        ) from error


def _readers(graph: ov.Model) -> Iterator[_Reader]:
    """Every port that reads a constant matrix, however it is unpacked."""
    moving: set[str] = set()
    for operation in graph.get_ordered_ops():
        kind = operation.get_type_name()
        sources = [value.get_node() for value in operation.input_values()]
        if kind in ("Parameter", "ReadValue") or any(source.get_name() in moving for source in sources):
            moving.add(operation.get_name())
        for port in {"MatMul": (0, 1), "Gather": (0,)}.get(kind, ()):
            source = operation.input_value(port)
            shape = source.get_partial_shape()
            if sources[port].get_name() in moving or shape.is_dynamic or sum(size > 1 for size in shape.to_shape()) < 2:
                continue
            if source.get_element_type().is_integral():
                continue
            names = frozenset(name.partition("/")[0] for name in _matrices_behind(sources[port]))
            yield _Reader(operation, port, names, kind == "MatMul" and not operation.get_attributes()["transpose_b"])


def _matrices_behind(node: Any) -> Iterator[str]:
    """The constants that an operation comes from and that are no index or scalar."""
    waiting, seen = [node], set()
    while waiting:
        one = waiting.pop()
        if one.get_name() in seen:
            continue
        seen.add(one.get_name())
        if one.get_type_name() == "Constant" and type_name(one) not in ("i64", "i32"):
            yield str(one.get_friendly_name())
        waiting += [value.get_node() for value in one.input_values()]


def _layer_checks(
    layer: LayerFormat, manifest: CheckpointManifest, constants: dict[str, Any], readers: list[_Reader]
) -> Iterator[Check]:
    """Codes, scales and zero points by digest, and what each reader makes of them."""
    parts = _parts(layer, constants)
    if parts is None or not readers:
        yield equal("codes as the checkpoint recorded them", layer.name, None, manifest.digests[layer.name].codes)
        return
    recorded, codes = manifest.digests[layer.name], parts["codes"]
    # Stored as (output, input) or as (input, output); the digest tells, and `reading` below checks the use.
    turned = codes.shape != (layer.out_features, layer.in_features) or bytes_digest(codes) != recorded.codes
    oriented = {name: np.ascontiguousarray(value.T if turned else value) for name, value in parts.items()}
    grid = (layer.out_features, layer.groups, 1)
    for name, value in oriented.items():
        shaped = value if name == "codes" else value.reshape(grid) if value.size == np.prod(grid) else value
        found, detail = bytes_digest(np.ascontiguousarray(shaped)), "other values than those that were trained"
        yield equal("as the checkpoint recorded it", f"{layer.name} {name}", found, getattr(recorded, name), detail)
    expected = _dequantized(layer, oriented)
    for reader in readers:
        yield _reading(layer, reader, expected)


def _parts(layer: LayerFormat, constants: dict[str, Any]) -> dict[str, NDArray[Any]] | None:
    """A layer's constants by part, scales in float16; None where one is missing or of another type."""
    names = {"codes": layer.name, "scale": f"{layer.name}/scale", "zero_point": f"{layer.name}/zero_point"}
    if storage(layer).symmetric:
        del names["zero_point"]
    if not all(name in constants for name in names.values()):
        return None
    wanted = storage(layer).element_type
    if any(type_name(constants[names[part]]) != wanted for part in names.keys() - {"scale"}):
        return None
    parts = {part: unpacked(constants[name]) for part, name in names.items()}
    scale = parts["scale"].astype(np.float16)
    if not np.array_equal(scale.astype(np.float32), parts["scale"]):
        return None
    return parts | {"scale": scale}


def _dequantized(layer: LayerFormat, parts: dict[str, NDArray[Any]]) -> NDArray[np.float32] | None:
    """(code - zero point) · scale, (output, input) float32; None where the shapes do not go together."""
    outputs, groups = layer.out_features, layer.groups
    if any(parts[part].size != outputs * groups for part in parts.keys() - {"codes"}):
        return None
    values = parts["codes"].astype(np.float32).reshape(outputs, groups, -1)
    if "zero_point" in parts:
        values -= parts["zero_point"].astype(np.float32).reshape(outputs, groups, 1)
    values *= parts["scale"].astype(np.float32).reshape(outputs, groups, 1)
    return values.reshape(outputs, -1)


def _reading(layer: LayerFormat, reader: _Reader, expected: NDArray[np.float32] | None) -> Check:
    """The matrix that an operation reads is what the codes stand for."""
    subject, source = f"{layer.name} as read by {reader.name}", reader.operation.input_value(reader.port)
    if expected is None:
        return equal("unpacked as codes, zero points and scales say", subject, None, 0, "of other shapes")
    compiled = compile_for_cpu(ov.Model([source], [], "matrix"), layer.name, ACCURATE)
    matrix: NDArray[np.float32] = compiled([])[0]
    oriented = matrix.T if reader.transposed else matrix
    if oriented.shape != expected.shape:
        return equal("unpacked as codes, zero points and scales say", subject, list(oriented.shape), 0)
    return zero("unpacked as codes, zero points and scales say", subject, int((oriented != expected).sum()))


def _no_strangers(readers: list[_Reader], manifest: CheckpointManifest) -> Check:
    """No MatMul or Gather reads a matrix that the checkpoint does not know, as that of an adapter."""
    known = {layer.name for layer in manifest.layers}
    floats = sum(1 for layer in manifest.layers if layer.encoding is None)
    strangers = [one.name for one in readers if not known & one.layers]
    return zero(
        "no adapter in the graph",
        "model",
        max(0, len(strangers) - floats),
        f"a matrix read by {', '.join(strangers[:3])}",
    )


def _runs_packed(graph: ov.Model, expected: int) -> Check:
    """The CPU computes each packed Linear from codes."""
    compiled = compile_for_cpu(graph, ONNX_FILE, {})
    counted: Counter[bool] = Counter()
    for operation in compiled.get_runtime_model().get_ordered_ops():
        information = operation.get_rt_info()
        if "layerType" in information and str(information["layerType"].astype(str)) == "FullyConnected":
            counted[
                any(value.get_element_type().to_string() in PACKED_TYPES for value in operation.input_values())
            ] += 1
    return equal("packed Linears run on packed weights", "runtime", counted[True], expected)


def _terms(reader: _Reader) -> int:
    shape = reader.operation.input_value(reader.port).get_partial_shape().to_shape()
    return int(shape[0 if reader.transposed else 1])
