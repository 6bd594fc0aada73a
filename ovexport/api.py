"""What Python code calls, as `ovexport.NAME`."""

from pathlib import Path
from typing import Any

from torch import nn

from ovexport.artifacts import Checkpoint
from ovexport.readers import nncf_out
from ovexport.readers.nncf_model import adopt_model
from ovexport.recipe import ModelSpec

__all__ = ["adopt", "to_nncf"]


def adopt(model: nn.Module, out: Path | str, *, base: ModelSpec | Path | str | None = None) -> Checkpoint:
    """Write a model that `nncf.compress_weights` returned as a checkpoint, which `ovexport convert` takes.

        model = nncf.compress_weights(model, …, compression_format=nncf.CompressionFormat.FQ_LORA)
        …                                                              # any loop of your own
        ovexport.adopt(model, "tuned")

    Its codes, scales and zero points are those that `nncf.strip` packs, each of them.

    Args:
        model: of transformers, in the format FQ_LORA or FQ_LORA_NLS, tuned or not. Elastic adapters have the ranks that
            are active in it. It is not changed.
        out: the folder to write to; it does not exist, or is empty.
        base: the model that was compressed, a folder or a hub id; without it the one that the model's configuration
            names. Weight matrices that differ from its own, as after AWQ, are taken from `model`.

    Raises:
        ArtifactError: the model is another one than the base, or `out` holds something.
        RecipeError: no base is given, and the model does not name one.
        UnsupportedModelError: the model has none of NNCF's quantizers, the base can't be loaded, or something was tuned
            that is no weight matrix.
    """
    return adopt_model(model, Path(out), _spec(base))


def to_nncf(checkpoint: Checkpoint | Path | str, base: ModelSpec | Path | str) -> dict[str, Any]:
    """A checkpoint as NNCF's examples save theirs: `nncf_state_dict`, `nncf_config` and `model_state`.

    Put on the base model with `nncf.torch.load_from_config` and `load_state_dict`, `nncf.strip` packs the very codes,
    scales and zero points of the checkpoint; the scale of a row of zeros alone may be another. Adapters are absorbed in
    the weights, and new ones begin at 0.

    Args:
        checkpoint: a folder with checkpoint.json.
        base: the model that was tuned, a folder or a hub id.

    Raises:
        ArtifactError: the checkpoint is corrupt, or of another base model.
        UnsupportedModelError: a layer has a format that NNCF's formats have not, or norms were tuned.
    """
    spec = _spec(base)
    assert spec is not None
    return nncf_out.to_nncf(checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(Path(checkpoint)), spec)


def _spec(base: ModelSpec | Path | str | None) -> ModelSpec | None:
    return ModelSpec(id=str(base)) if isinstance(base, str | Path) else base
