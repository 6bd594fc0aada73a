"""Are the norms those that were tuned? Each constant is compared with the checkpoint's, bit by bit."""

from collections.abc import Sequence
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
        problem = _misplaced(norm, constants.get(norm.name, ()))
        if problem:
            checks.append(zero(_TUNED, norm.name, expected.size, problem))
            continue
        differing = np.flatnonzero(_stored(constants[norm.name][0]) != expected.reshape(-1).view(np.uint32))
        detail = f"other values than those that were tuned, first at {differing[0]}" if len(differing) else ""
        checks.append(zero(_TUNED, norm.name, len(differing), detail))
    return checks


def base_norms(original: ov.Model, manifest: CheckpointManifest) -> list[Check]:
    """In the base, the constants of the tuned norms are those layers' own, with the values that tuning began with."""
    constants = _by_name(original)
    checks = []
    for norm in manifest.norms:
        problem = _misplaced(norm, constants.get(norm.name, ()))
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


def _expected(norm: TunedNorm, adapters: TensorFile) -> NDArray[np.float32]:
    """What the layer multiplies with or adds: the tuned values, and 1 more where the model's layer adds it."""
    values = adapters.require(norm.name)
    if values.shape != norm.shape or values.dtype != np.float32 or not np.isfinite(values).all():
        raise ArtifactError(f"{norm.name}: no finite float32 values of shape {norm.shape}; tune again")
    return values + np.float32(1) if norm.added else values


def _stored(node: Any) -> NDArray[np.uint32]:
    return raw(node).view(np.uint32)
