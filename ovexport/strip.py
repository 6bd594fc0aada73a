"""Stage strip: a checkpoint's adapters and scales become 4-bit codes, scales and zero points (the DQ format)."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ovexport.artifacts import (
    BITS,
    Checkpoint,
    CheckpointManifest,
    LayerFormat,
    Mode,
    PackedManifest,
    PackedWeights,
    atomic_folder,
    write_record,
)
from ovexport.errors import ArtifactError
from ovexport.model import load_model, matrix, weight_digest
from ovexport.quantization import Codes, load_quantizer
from ovexport.recipe import ModelSpec
from ovexport.tensorfile import TensorFile, write_tensors


def strip(checkpoint: Checkpoint, model: ModelSpec, out: Path) -> PackedWeights:
    """Absorb the adapters: compute every layer's codes and pack them.

    Raises:
        ArtifactError: the checkpoint is corrupt or of another base model, or its codes are not those that tuning
            ended with.
    """
    manifest = checkpoint.manifest
    network = load_model(model)
    adapters = checkpoint.adapters
    changed = checkpoint.weights if manifest.changed else None
    tensors: dict[str, NDArray[np.generic]] = {}
    for layer in manifest.layers:
        weight = _weight(network, layer, manifest, changed)
        if layer.mode == "float":
            if layer.name in manifest.changed:
                tensors[layer.name] = weight.float().numpy()
            continue
        codes = load_quantizer(layer, adapters).quantize(weight)
        if codes.digest() != manifest.digests[layer.name]:
            raise ArtifactError(
                f"{checkpoint.path}: the codes of {layer.name} are not those that tuning ended with; "
                "the checkpoint was changed, tune again"
            )
        tensors |= {f"{layer.name}.{part}": value for part, value in packed_tensors(codes, layer.mode).items()}
    packed = PackedManifest(layers=manifest.layers, weight_digests=manifest.weight_digests, changed=manifest.changed)
    with atomic_folder(out) as folder:
        write_tensors(tensors, folder / "packed.safetensors")
        write_record(packed, folder / "packed.json")
    return PackedWeights(out)


def packed_tensors(codes: Codes, mode: Mode) -> dict[str, NDArray[np.generic]]:
    """Codes, scales and zero points as they lie in the IR: 4-bit ones two to a byte, low nibble first."""
    pack = _nibbles if BITS[mode] == 4 else _bytes
    tensors = {"codes": pack(codes.codes), "scale": codes.scale.numpy()}
    if codes.zero_point is not None:
        tensors["zero_point"] = pack(codes.zero_point)
    return tensors


def _nibbles(values: Tensor) -> NDArray[np.uint8]:
    flat: NDArray[np.uint8] = values.contiguous().view(torch.uint8).reshape(-1).numpy() & np.uint8(0x0F)
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    packed: NDArray[np.uint8] = flat[0::2] | flat[1::2] << np.uint8(4)
    return packed


def _bytes(values: Tensor) -> NDArray[np.uint8]:
    flat: NDArray[np.uint8] = values.contiguous().reshape(-1).numpy()
    return flat


def _weight(
    network: PreTrainedModel, layer: LayerFormat, manifest: CheckpointManifest, changed: TensorFile | None
) -> Tensor:
    """The weight that the adapters are added to, (output, input), once it is known to be the one that was tuned."""
    base = matrix(network, layer.name, transposed=layer.transposed)
    if weight_digest(base) != manifest.weight_digests[layer.name]:
        raise ArtifactError(
            f"{layer.name}: not the weights that the checkpoint was tuned on; give the base model {manifest.model_id}"
        )
    if changed is None or layer.name not in changed:
        return base
    return torch.from_numpy(np.array(changed[layer.name]))
