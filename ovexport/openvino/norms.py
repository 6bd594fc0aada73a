"""The constants of a traced graph that hold the weights and biases of normalization layers.

The tracer gives them numbers for names. Here each gets the name of the parameter that it holds, once, when the model is
traced; from then on it is known by that name. Needs openvino and NumPy only.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from ovexport.artifacts import IR
from ovexport.errors import UnsupportedModelError
from ovexport.openvino.graph import raw, read_graph, read_xml, type_name
from ovexport.storage.digests import bytes_digest


def name_norms(xml: Path, values: Mapping[str, NDArray[np.float32]]) -> None:
    """Give the constants that hold norms the names of their parameters. One that does not have a constant of its own in
    float32 is left out.

    Args:
        values: what each layer multiplies with or adds, by the parameter's name.
    """
    graph = read_xml(xml)
    nodes: dict[str, list[Any]] = {}
    for node in _float32_constants(graph):
        nodes.setdefault(bytes_digest(raw(node)), []).append(node)
    names: dict[str, str] = {}
    for name, own in values.items():
        held = [node for node in nodes.get(bytes_digest(own), ()) if _is_read_by(node, name.rpartition(".")[0])]
        if len(held) == 1:
            names[held[0].get_friendly_name()] = name
    del graph, nodes
    _rename(xml, names)


def norm_constants(graph: ov.Model, names: Iterable[str]) -> dict[str, Any]:
    """By name of a norm's parameter, the constant of a traced graph that holds it.

    Raises:
        UnsupportedModelError: one is not there.
    """
    nodes = {node.get_friendly_name(): node for node in _float32_constants(graph)}
    found = {name: nodes.get(name) for name in names}
    for name, node in found.items():
        if node is None:
            raise UnsupportedModelError(
                f"{name}: no float32 constant of the traced graph holds this norm alone (the tracer leaves out weights "
                "of 1 and biases of 0); if an earlier version of ovexport traced the model, remove that IR to have it "
                "traced again, else set tune.norms = false"
            )
    return found


def require_norm_constants(ir: IR, names: Iterable[str]) -> None:
    """Refuse a traced IR that norms can't be written into.

    Raises:
        ArtifactError: the IR can't be read.
        UnsupportedModelError: as norm_constants.
    """
    norm_constants(read_graph(ir), names)


def _float32_constants(graph: ov.Model) -> list[Any]:
    return [node for node in graph.get_ops() if node.get_type_name() == "Constant" and type_name(node) == "f32"]


def _is_read_by(node: Any, module: str) -> bool:
    """Whether the operations of one module, and no others, read a constant."""
    readers = [target.get_node().get_friendly_name() for target in node.output(0).get_target_inputs()]
    return bool(readers) and all(name.startswith(f"__module.{module}/") for name in readers)


def _rename(xml: Path, names: Mapping[str, str]) -> None:
    tree = ElementTree.parse(xml)
    for layer in tree.getroot().iter("layer"):
        if layer.get("type") == "Const" and layer.get("name") in names:
            layer.set("name", names[layer.get("name", "")])
    tree.write(xml, encoding="utf-8", xml_declaration=True)
