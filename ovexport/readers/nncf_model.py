"""Adopt a model that `nncf.compress_weights` returned: in memory, with no file between."""

from pathlib import Path
from typing import Any

from torch import nn

from ovexport.artifacts import Checkpoint
from ovexport.errors import RecipeError, UnsupportedModelError
from ovexport.models.architecture import parameter_of_hook
from ovexport.readers.nncf import HOOKS_IN_MODEL_STATE, write_adopted
from ovexport.readers.nncf_file import stored_quantizers
from ovexport.readers.reader import BaseWeights
from ovexport.recipe import ModelSpec
from ovexport.storage.files import require_free

_ORIGIN = "the model"


def adopt_model(model: nn.Module, out: Path, base: ModelSpec | None = None) -> Checkpoint:
    """Write a model that NNCF compressed as a checkpoint of ours.

    Args:
        model: of transformers, with the quantizers that `nncf.compress_weights` put on it, tuned or not. Elastic
            adapters have the ranks that are active in it. It is not changed.
        out: the folder to write to; it does not exist, or is empty.
        base: the model that was compressed; where None the one that its configuration names. Weight matrices that
            differ from its own are taken from `model`.

    Raises:
        ArtifactError: it is of another base model, or `out` holds something.
        RecipeError: no base is given, and the model does not name one.
        UnsupportedModelError: NNCF did not compress it in one of these formats, the base model can't be loaded, or
            something changed that is no weight matrix.
    """
    import nncf.torch
    from nncf.torch.function_hook.wrapper import get_hook_storage

    require_free(out, "out")
    spec = base or _named_base(model)
    try:
        storage = get_hook_storage(model)
    except (AttributeError, nncf.InstallationError) as error:
        raise UnsupportedModelError(_NOT_COMPRESSED) from error
    try:
        config = nncf.torch.get_config(model)
    except nncf.InternalError as error:  # modules of other formats, as DQ's, have no configuration
        raise UnsupportedModelError(_NOT_COMPRESSED) from error
    state = {name: value.detach().cpu() for name, value in storage.state_dict().items()}
    stored = stored_quantizers(_ORIGIN, {"nncf_config": config, "nncf_state_dict": state})
    if not stored:
        raise UnsupportedModelError(_NOT_COMPRESSED)
    active = {
        parameter_of_hook(hook): int(module.active_lora_rank)
        for hook, module in storage.named_hooks()
        if hasattr(module, "active_lora_rank")
    }
    weights: dict[str, Any] = {
        name: value.detach().cpu()
        for name, value in model.state_dict().items()
        if not name.startswith(HOOKS_IN_MODEL_STATE)
    }
    return write_adopted(_ORIGIN, stored, weights, active, BaseWeights.load(spec), out)


_NOT_COMPRESSED = (
    "the model: has no quantizers of NNCF's that can be tuned; give what nncf.compress_weights returned with "
    "compression_format FQ_LORA "
    "or FQ_LORA_NLS, before nncf.strip"
)


def _named_base(model: nn.Module) -> ModelSpec:
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        raise RecipeError("base: missing, and the model does not name the one that it was loaded from; give it")
    return ModelSpec(id=str(name))
