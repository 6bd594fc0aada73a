"""Writing a checkpoint: the parameters of a model's quantizers, and the codes that they give."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from ovexport.artifacts import Checkpoint, CheckpointManifest
from ovexport.recipe import ModelSpec
from ovexport.storage.files import atomic_folder
from ovexport.storage.records import write_record
from ovexport.storage.tensorfile import write_tensors
from ovexport.versions import stack_versions
from ovexport.weights.layer import LayerFormat
from ovexport.weights.quantizer import Quantizer


def write_checkpoint(
    out: Path,
    model: ModelSpec,
    layers: tuple[LayerFormat, ...],
    digests: dict[str, str],
    weights: Mapping[str, Tensor],
    quantizers: Mapping[str, Quantizer],
    changed: Mapping[str, Tensor],
    *,
    rank_space: tuple[int, ...] = (),
    rank_by: Literal["block", "linear"] = "block",
    steps: int | None = 0,
) -> Checkpoint:
    """Write a checkpoint that nothing was tuned of here: the quantizers' parameters, and the codes they give.

    Args:
        digests: SHA-256 of each layer's weights in the base model.
        weights: of the base model by layer, (output, input).
        changed: those that stand in their place, float32.
        rank_space, rank_by, steps: as in the manifest.
    """
    manifest = CheckpointManifest(
        model_id=model.id,
        revision=model.revision,
        layers=layers,
        weight_digests=digests,
        replaced_weights=tuple(sorted(changed)),
        digests={
            name: quantizer.quantize(changed.get(name, weights[name])).digest()
            for name, quantizer in quantizers.items()
        },
        rank_space=rank_space,
        rank_by=rank_by,
        steps=steps,
        versions=stack_versions(),
    )
    tensors = {
        f"{name}.{key}": value.numpy()
        for name, quantizer in quantizers.items()
        for key, value in quantizer.stored().items()
    }
    with atomic_folder(out) as folder:
        write_tensors(tensors, folder / "adapters.safetensors")
        if changed:
            write_tensors({name: value.numpy() for name, value in changed.items()}, folder / "weights.safetensors")
        write_record(manifest, folder / "checkpoint.json")
    return Checkpoint(out)
