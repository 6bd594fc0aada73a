"""Writing a checkpoint: the parameters of a model's quantizers, the codes that they give, and what the model says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ovexport.artifacts import Checkpoint, CheckpointManifest
from ovexport.models.reference import reference_logits
from ovexport.models.student import Student, stored_parameters
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
    replaced: Mapping[str, Tensor],
    *,
    rank_space: tuple[int, ...] = (),
    rank_by: Literal["block", "linear"] = "block",
    steps: int | None = 0,
) -> Checkpoint:
    """Write a checkpoint that nothing was tuned of here: the quantizers' parameters, and the codes they give.

    Args:
        digests: SHA-256 of each layer's weights in the base model.
        weights: of the base model by layer, (output, input).
        replaced: those that take their place, float32.
        rank_space, rank_by, steps: as in the manifest.
    """
    manifest = CheckpointManifest(
        model_id=model.id,
        revision=model.revision,
        adapter=model.adapter,
        layers=layers,
        weight_digests=digests,
        replaced_weights=tuple(sorted(replaced)),
        digests={name: one.quantize(replaced.get(name, weights[name])).digest() for name, one in quantizers.items()},
        rank_space=rank_space,
        rank_by=rank_by,
        steps=steps,
        versions=stack_versions(),
    )
    tensors = {key: value.numpy() for key, value in stored_parameters(quantizers).items()}
    with atomic_folder(out) as folder:
        write_tensors(tensors, folder / "adapters.safetensors")
        if replaced:
            write_tensors({name: value.numpy() for name, value in replaced.items()}, folder / "weights.safetensors")
        write_record(manifest, folder / "checkpoint.json")
    return Checkpoint(out)


def write_outcome(
    folder: Path,
    manifest: CheckpointManifest,
    student: Student,
    ranks: Mapping[str, int],
    tokens: NDArray[np.int32],
) -> None:
    """Write what follows from a checkpoint's adapters and ranks: checkpoint.json with the digests of the codes, and
    reference.safetensors.

    Args:
        manifest: of the checkpoint with other ranks.
        student: with the adapters and ranks; it is in float32 from here on.
        ranks: by layer; empty for adapters without a rank space.
        tokens: held-out text, (sequences, length).
    """
    layers = tuple(layer.with_values(active_rank=ranks.get(layer.name)) for layer in manifest.layers)
    weights = student.base_weights
    digests = {name: quantizer.quantize(weights[name]).digest() for name, quantizer in student.quantizers.items()}
    write_tensors(reference_logits(student, tokens), folder / "reference.safetensors")
    write_record(
        manifest.with_values(layers=layers, digests=digests, versions=stack_versions()), folder / "checkpoint.json"
    )
