"""Stage strip: a checkpoint's adapters and scales become 4-bit codes, scales and zero points (the DQ format).

The weights that the adapters are added to are read from the traced IR, a block of rows at a time, and the packed ones
are written layer by layer: no copy of the model is in memory.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from torch import Tensor

from ovexport.artifacts import (
    ADAPTER_FOLDER,
    IR,
    Checkpoint,
    CheckpointManifest,
    PackedManifest,
    PackedWeights,
)
from ovexport.errors import ArtifactError
from ovexport.openvino.graph import raw, read_graph
from ovexport.openvino.matrices import Matrix
from ovexport.openvino.norms import norm_constants
from ovexport.openvino.weight_index import indexed_matrices
from ovexport.storage.digests import bytes_digest
from ovexport.storage.files import atomic_folder
from ovexport.storage.records import write_record
from ovexport.storage.tensorfile import TensorFile, TensorWriter
from ovexport.weights.adapters import load_any_quantizer
from ovexport.weights.encoding import Encoding
from ovexport.weights.layer import LayerFormat
from ovexport.weights.norm import TunedNorm
from ovexport.weights.quantizer import Codes, Rows


def strip(checkpoint: Checkpoint, base: IR, out: Path) -> PackedWeights:
    """Absorb the adapters: compute every layer's codes and pack them. Adapters that stay beside the codes are written
    in PEFT's layout.

    Args:
        base: the traced IR of the model that the checkpoint was tuned on, with its index of weights.

    Raises:
        ArtifactError: the checkpoint is corrupt or of another base model, or its codes are not those that tuning
            ended with.
        UnsupportedModelError: which constant of the base is a layer's can't be told.
    """
    manifest = checkpoint.manifest
    graph = read_graph(base)
    matrices = indexed_matrices(base, graph, manifest)
    _require_base_norms(graph, manifest)
    packed = PackedManifest(
        model_id=manifest.model_id,
        revision=manifest.revision,
        adapter=manifest.adapter,
        layers=manifest.layers,
        weight_digests=manifest.weight_digests,
        replaced_weights=manifest.replaced_weights,
        checkpoint_files=checkpoint.files,
        tuning_steps=manifest.steps,
        norms=manifest.norms,
    )
    beside = checkpoint.beside
    with atomic_folder(out) as folder:
        if beside is not None:
            beside.write(folder / ADAPTER_FOLDER)
        with TensorWriter(folder / "packed.safetensors", _layout(manifest)) as writer:
            _pack(checkpoint, manifest, matrices, writer)
        write_record(packed, folder / "packed.json")
    return PackedWeights(out)


def _pack(
    checkpoint: Checkpoint, manifest: CheckpointManifest, matrices: Mapping[str, Matrix], writer: TensorWriter
) -> None:
    """Write every tensor of packed.safetensors.

    Args:
        matrices: of the base, by layer.
    """
    adapters = checkpoint.adapters
    replaced: Mapping[str, NDArray[np.float32]] = checkpoint.weights if manifest.replaced_weights else {}
    for layer in manifest.layers:
        if layer.encoding is not None:
            codes = load_any_quantizer(layer, adapters).quantize(_weight(layer, manifest, matrices, replaced))
            _require_tuned(codes, layer, checkpoint, manifest)
            for part, value in packed_tensors(codes, layer.encoding).items():
                writer.write(f"{layer.name}.{part}", value)
        elif layer.name in manifest.replaced_weights:
            writer.write(layer.name, replaced[layer.name])
    for norm in manifest.norms:
        writer.write(norm.name, _norm_values(norm, adapters))


def _norm_values(norm: TunedNorm, adapters: TensorFile) -> NDArray[np.float32]:
    values = adapters.require(norm.name)
    if values.shape != norm.shape or values.dtype != np.float32 or not np.isfinite(values).all():
        raise ArtifactError(
            f"{norm.name}: the checkpoint has no finite float32 values of shape {norm.shape}; tune again"
        )
    return values


def _require_tuned(codes: Codes, layer: LayerFormat, checkpoint: Checkpoint, manifest: CheckpointManifest) -> None:
    if codes.digest() != manifest.digests[layer.name]:
        raise ArtifactError(
            f"{checkpoint.path}: the codes of {layer.name} are not those that tuning ended with; "
            "the checkpoint was changed, tune again"
        )


def _require_base_norms(graph: ov.Model, manifest: CheckpointManifest) -> None:
    """Refuse a base model whose norms are not those that tuning began with.

    Raises:
        ArtifactError: naming the norm.
    """
    constants = norm_constants(graph, [norm.name for norm in manifest.norms])
    for norm in manifest.norms:
        if bytes_digest(raw(constants[norm.name])) != norm.base_digest:
            raise ArtifactError(
                f"{norm.name}: not the norm that the checkpoint was tuned on; give the base model {manifest.model}"
            )


def _layout(manifest: CheckpointManifest) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor of packed.safetensors."""
    layout: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer in manifest.packed:
        encoding, scales = layer.require_encoding(), layer.out_features * layer.groups
        layout[f"{layer.name}.codes"] = ("U8", (encoding.packed_bytes(layer.out_features * layer.in_features),))
        layout[f"{layer.name}.scale"] = ("F16", (layer.out_features, layer.groups, 1))
        if encoding.zero_points == "codes":
            layout[f"{layer.name}.zero_point"] = ("U8", (encoding.packed_bytes(scales),))
        elif encoding.zero_points == "float16":
            layout[f"{layer.name}.zero_point"] = ("F16", (layer.out_features, layer.groups, 1))
    floats = [layer for layer in manifest.layers if layer.encoding is None and layer.name in manifest.replaced_weights]
    layout |= {layer.name: ("F32", (layer.out_features, layer.in_features)) for layer in floats}
    return layout | {norm.name: ("F32", norm.shape) for norm in manifest.norms}


def packed_tensors(codes: Codes, encoding: Encoding) -> dict[str, NDArray[np.generic]]:
    """Codes, scales and zero points as they lie in the IR."""
    tensors: dict[str, NDArray[np.generic]] = {"codes": encoding.pack(codes.codes.numpy())}
    tensors["scale"] = codes.scale.numpy()
    if codes.zero_point is not None:
        zero_point = codes.zero_point.numpy()
        tensors["zero_point"] = zero_point if encoding.zero_points == "float16" else encoding.pack(zero_point)
    return tensors


class _FileRows:
    """Rows of a matrix in the traced IR or in the checkpoint, read when they are asked for."""

    def __init__(self, read: Callable[[slice], NDArray[np.float32]]) -> None:
        self._read = read

    def __getitem__(self, rows: slice, /) -> Tensor:
        return torch.from_numpy(self._read(rows))


def _weight(
    layer: LayerFormat,
    manifest: CheckpointManifest,
    matrices: Mapping[str, Matrix],
    replaced: Mapping[str, NDArray[np.float32]],
) -> Rows:
    """The weight that the adapters are added to, known by its digest to be the one that was tuned."""
    matrix = matrices.get(layer.name)
    if matrix is None:
        raise ArtifactError(
            f"{layer.name}: not the weights that the checkpoint was tuned on; give the base model {manifest.model}"
        )
    if layer.name in replaced:
        own = replaced[layer.name]
        return _FileRows(lambda rows: np.array(own[rows]))
    return _FileRows(matrix.reader())
