"""Are the norms those that were tuned? Each constant is compared with the checkpoint's, bit by bit."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovexport.artifacts import CheckpointManifest
from ovexport.errors import ArtifactError
from ovexport.openvino.graph import raw, type_name
from ovexport.reports import Check
from ovexport.storage.digests import bytes_digest
from ovexport.storage.tensorfile import TensorFile
from ovexport.verify.checks import zero
from ovexport.weights.norm import TunedNorm

_TUNED = "norm as the checkpoint has it"
_BASE = "norm of the base as tuning began with it"


def tuned_norms(graph: ov.Model, manifest: CheckpointManifest, adapters: TensorFile) -> list[Check]:
    """Every tuned norm has one constant of its name, read by its own layer alone, with the checkpoint's values.

    Raises:
        ArtifactError: the checkpoint lacks a norm, or holds one of another shape or not finite.
    """
    constants = _by_name(graph)
    checks = []
    for norm in manifest.norms:
        expected = _expected(norm, adapters)
        nodes = constants.get(norm.name, [])
        problem = _misplaced(norm, nodes)
        checks.append(zero(_TUNED, norm.name, expected.size, problem) if problem else _same(norm, nodes[0], expected))
    return checks


def onnx_norms(constants: Mapping[str, Any], manifest: CheckpointManifest, adapters: TensorFile) -> list[Check]:
    """Every tuned norm is a constant of an ONNX graph, which holds parameters as the model does, by their names.

    Args:
        constants: of the graph, by name.

    Raises:
        ArtifactError: as tuned_norms.
    """
    checks = []
    for norm in manifest.norms:
        expected, node = _parameter(norm, adapters), constants.get(f"network.{norm.name}")
        if node is None or type_name(node) != "f32" or tuple(node.get_output_shape(0)) != norm.shape:
            checks.append(zero(_TUNED, norm.name, expected.size, "not in the graph"))
        else:
            checks.append(_same(norm, node, expected))
    return checks


def base_norms(original: ov.Model, manifest: CheckpointManifest) -> list[Check]:
    """In the base, the constants of the tuned norms are those layers' own, with the values that tuning began with."""
    constants = _by_name(original)
    checks = []
    for norm in manifest.norms:
        problem = _misplaced(norm, constants.get(norm.name, []))
        if not problem and bytes_digest(raw(constants[norm.name][0])) != norm.base_digest:
            problem = "other values than those that tuning began with"
        checks.append(zero(_BASE, norm.name, int(bool(problem)), problem))
    return checks


def _by_name(graph: ov.Model) -> dict[str, list[Any]]:
    """The graph's own constants; one in a graph inside it is no norm."""
    constants: dict[str, list[Any]] = {}
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Constant":
            constants.setdefault(node.get_friendly_name(), []).append(node)
    return constants


def _misplaced(norm: TunedNorm, nodes: Sequence[Any]) -> str:
    """What is wrong with the constants of a norm's name, their values aside; nothing where it is empty."""
    if len(nodes) != 1:
        return f"{len(nodes)} constants of this name"
    (node,) = nodes
    if type_name(node) != "f32" or int(np.prod(node.get_output_shape(0))) != int(np.prod(norm.shape)):
        return f"{type_name(node)} {list(node.get_output_shape(0))}"
    module = norm.name.rpartition(".")[0]
    readers = [target.get_node().get_friendly_name() for target in node.output(0).get_target_inputs()]
    strangers = [name for name in readers if not name.startswith(f"__module.{module}/")]
    if strangers or not readers:
        return f"read by {strangers[0] if strangers else 'nothing'}"
    return ""


def _same(norm: TunedNorm, node: Any, expected: NDArray[np.float32]) -> Check:
    """A constant's values are the expected ones, bit by bit."""
    stored = raw(node).view(np.uint32)
    differing = np.flatnonzero(stored != np.ascontiguousarray(expected).reshape(-1).view(np.uint32))
    first = f"other values than those that were tuned, first at {differing[0]}" if len(differing) else ""
    return zero(_TUNED, norm.name, len(differing), first)


def _expected(norm: TunedNorm, adapters: TensorFile) -> NDArray[np.float32]:
    """What the layer multiplies with or adds: the tuned values, and 1 more where the model's layer adds it."""
    values = _parameter(norm, adapters)
    return values + np.float32(1) if norm.added else values


def _parameter(norm: TunedNorm, adapters: TensorFile) -> NDArray[np.float32]:
    values = adapters.require(norm.name)
    if values.shape != norm.shape or values.dtype != np.float32 or not np.isfinite(values).all():
        raise ArtifactError(f"{norm.name}: no finite float32 values of shape {norm.shape}; tune again")
    return values
