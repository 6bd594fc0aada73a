"""The index of a traced graph's weights: made once when it is traced, so that strip and convert hash nothing again.

Both trust it. The proof does not: verify finds the weights by hashing the graph's constants itself.
"""

from collections.abc import Iterable

import openvino as ov

from ovexport.artifacts import IR, CheckpointManifest, IndexedConstant, PackedManifest, WeightIndex
from ovexport.errors import ArtifactError
from ovexport.openvino.graph import constants, read_graph
from ovexport.openvino.matrices import Content, Matrix, choose_matrices, matrices_by_content
from ovexport.weights.layer import WeightMatrix


def make_index(ir: IR, matrices: Iterable[WeightMatrix]) -> WeightIndex:
    """Hash the constants of a traced IR that have the shape of one of the model's matrices.

    Raises:
        ArtifactError: the IR can't be read.
    """
    graph = read_graph(ir)
    return WeightIndex(
        constants=tuple(
            IndexedConstant(
                constant=matrix.node.get_friendly_name(),
                digest=digest,
                out_features=out_features,
                in_features=in_features,
                transposed=matrix.transposed,
            )
            for (digest, out_features, in_features), candidates in matrices_by_content(graph, matrices).items()
            for matrix in candidates
        )
    )


def indexed_matrices(ir: IR, graph: ov.Model, manifest: CheckpointManifest | PackedManifest) -> dict[str, Matrix]:
    """By layer, the one constant of a traced graph that holds its weights, as the IR's index has it.

    Args:
        ir: the traced IR.
        graph: its graph.

    Raises:
        ArtifactError: there is no index, or it is of another IR.
        UnsupportedModelError: as layer_matrices.
    """
    nodes = {node.get_friendly_name(): node for node in constants(graph)}
    by_content: dict[Content, list[Matrix]] = {}
    for entry in ir.weight_index.constants:
        node = nodes.get(entry.constant)
        shape = (entry.out_features, entry.in_features)
        if node is None or tuple(node.get_output_shape(0)) != (shape[::-1] if entry.transposed else shape):
            raise ArtifactError(
                f"{ir.index_file}: lists {entry.constant} with {shape}, which is not in {ir.xml}; trace the model again"
            )
        by_content.setdefault((entry.digest, *shape), []).append(Matrix(node, entry.transposed))
    return choose_matrices(manifest, by_content)
