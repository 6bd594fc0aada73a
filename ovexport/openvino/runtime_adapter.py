"""An IR with the adapter that lies beside it, as a graph that gives the logits of the two."""

from typing import Any

import openvino as ov
from openvino import opset13 as opset

from ovexport.artifacts import IR, AdaptedLayer, PeftAdapter
from ovexport.errors import ArtifactError
from ovexport.openvino.graph import read_graph, walk


def running_graph(ir: IR) -> ov.Model:
    """An IR's graph as it runs: with the two products of each adapted layer, if it has an adapter.

    Raises:
        ArtifactError: it is missing or no IR, or the adapter is damaged or of another model.
    """
    graph = read_graph(ir)
    if ir.adapter is not None:
        _add(graph, PeftAdapter.read(ir.adapter))
    return graph


def _add(graph: ov.Model, adapter: PeftAdapter) -> None:
    """Add an adapter to the outputs of the MatMuls that read its layers' weights."""
    products = _products(graph)
    for layer in adapter.layers:
        users = products.get(f"{layer.module}.weight")
        if not users:
            raise ArtifactError(
                f"{adapter.name}: no MatMul of the graph reads the weights of {layer.module}; give the adapter of this "
                "model"
            )
        for user in users:
            _add_to(user, layer)
    graph.validate_nodes_and_infer_types()


def _products(graph: ov.Model) -> dict[str, list[Any]]:
    """The MatMuls by the names of the constants that their second factors come from."""
    found: dict[str, list[Any]] = {}
    for _, node in walk(graph):
        if node.get_type_name() == "MatMul":
            source = node.input_value(1).get_node()
            while source.get_input_size():
                source = source.input_value(0).get_node()
            found.setdefault(source.get_friendly_name(), []).append(node)
    return found


def _add_to(product: Any, layer: AdaptedLayer) -> None:
    readers = product.output(0).get_target_inputs()
    inputs = product.input_value(0)
    element_type = product.get_output_element_type(0)
    down, up = (
        opset.convert(opset.constant(values), element_type) for values in (layer.lora_A, layer.factor * layer.lora_B)
    )
    transposed = product.get_attributes()["transpose_a"]
    reduced = opset.matmul(inputs, down, transposed, True)
    added = opset.add(product, opset.matmul(reduced, up, False, True))
    for reader in readers:
        reader.replace_source_output(added.output(0))
