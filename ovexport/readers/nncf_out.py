"""Checkpoints as NNCF's examples save theirs, whatever tuned them: the way back.

NNCF adds B·A in another type than ovexport does, so the adapters are absorbed: the weights are what the codes stand
for, which lie on the grid, and NNCF's quantizers have that grid and adapters whose product is 0. Rounding such a weight
gives its code again, in NNCF's arithmetic as in any.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ovexport.artifacts import Checkpoint
from ovexport.errors import ArtifactError, UnsupportedModelError
from ovexport.models.architecture import hook_of_parameter
from ovexport.models.loading import load_model
from ovexport.models.matrix_view import matrix_view, weight_digest
from ovexport.recipe import ModelSpec
from ovexport.weights.adapters import load_any_quantizer
from ovexport.weights.layer import LayerFormat
from ovexport.weights.nncf_quantizer import SMALLEST_STEP
from ovexport.weights.quantizer import Codes

_LAYERS = "nncf.torch.quantization.layers"


def to_nncf(checkpoint: Checkpoint, model: ModelSpec) -> dict[str, Any]:
    """What NNCF's examples save: `nncf_state_dict`, `nncf_config`, and `model_state` with the de-quantized weights,
    float32.

    Raises:
        ArtifactError: the checkpoint is corrupt, or of another base model.
        UnsupportedModelError: a layer has a format that NNCF's formats have not, or norms were tuned.
    """
    import nncf.torch
    from nncf.torch.function_hook.wrapper import get_hook_storage

    manifest, adapters = checkpoint.manifest, checkpoint.adapters
    _require_no_norms(checkpoint)
    network = load_model(model, dtype=torch.float32)
    stored = load_model(model)
    replaced = checkpoint.weights if manifest.replaced_weights else {}
    commands: list[dict[str, Any]] = []
    state: dict[str, Tensor] = {}
    for layer in manifest.layers:
        own = matrix_view(stored, layer.name).read()
        if weight_digest(own) != manifest.weight_digests[layer.name]:
            raise ArtifactError(
                f"{layer.name}: not the weights that the checkpoint was tuned on; give the base model "
                f"{manifest.model_id}"
            )
        weight = torch.from_numpy(replaced[layer.name].copy()) if layer.name in replaced else own
        view = matrix_view(network, layer.name)
        if layer.encoding is None:
            view.write(weight)
            continue
        _require_known(layer)
        codes = load_any_quantizer(layer, adapters).quantize(weight)
        values = _dequantized(codes, layer)
        _require_wide_steps(codes, values, layer)
        view.write(values)
        hook = hook_of_parameter(layer.name)
        commands.append(_command(layer, hook))
        state |= {f"{hook}.{name}": value for name, value in _parameters(codes, layer)}
    wrapped = nncf.torch.load_from_config(network, {"compression_state": commands})
    get_hook_storage(wrapped).load_state_dict(state)
    return {
        "nncf_state_dict": get_hook_storage(wrapped).state_dict(),
        "nncf_config": nncf.torch.get_config(wrapped),
        "model_state": wrapped.state_dict(),
    }


def _require_no_norms(checkpoint: Checkpoint) -> None:
    if checkpoint.manifest.norms:
        raise UnsupportedModelError(
            f"{checkpoint.path}: its norms were tuned (tune.norms), and NNCF's quantizers hold none; convert the "
            "checkpoint to an IR"
        )


def _require_known(layer: LayerFormat) -> None:
    """Refuse what NNCF's formats have not.

    Raises:
        UnsupportedModelError: it is such a layer.
    """
    reasons = {
        "a Conv1D, whose inputs NNCF groups in another way": layer.transposed,
        "its zero points are float16": layer.require_encoding().zero_points == "float16",
        "its adapter is not absorbed": layer.adapter == "beside" and layer.rank > 0,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedModelError(
                f"{layer.name}: {reason}, and NNCF's FQ_LORA has no such format; convert the checkpoint to an IR"
            )


def _dequantized(codes: Codes, layer: LayerFormat) -> Tensor:
    """What the codes stand for, (output, input) float32."""
    grouped = codes.codes.float().reshape(layer.out_features, layer.groups, layer.group_size)
    if codes.zero_point is not None:
        grouped -= codes.zero_point.float()
    return (grouped * codes.scale.float()).flatten(1)


def _require_wide_steps(codes: Codes, values: Tensor, layer: LayerFormat) -> None:
    """Refuse scales that NNCF widens, but for groups of zeros, whose scale says nothing.

    Raises:
        UnsupportedModelError: there is one.
    """
    narrow = codes.scale.float().abs() < SMALLEST_STEP
    if (values.reshape(layer.out_features, layer.groups, -1) * narrow).any():
        raise UnsupportedModelError(
            f"{layer.name}: has scales below {SMALLEST_STEP:.3g}, which nncf.strip widens; convert the checkpoint "
            "to an IR"
        )


def _command(layer: LayerFormat, hook: str) -> dict[str, Any]:
    """A quantizer in `nncf_config`."""
    from nncf.common.quantization.structs import QuantizationScheme

    encoding = layer.require_encoding()
    kind = "Symmetric" if encoding.symmetric else "Asymmetric"
    lora = "Lora" if encoding.bits == 4 else ""
    mode = f"{kind.upper()}{'_LORA' if lora else ''}"
    qspec = {
        "num_bits": encoding.bits,
        "mode": QuantizationScheme[mode],
        "signedness_to_force": True,
        "narrow_range": False,
        "half_range": False,
        "scale_shape": torch.Size(_scale_shape(layer)),
        "logarithm_scale": False,
        "is_quantized_on_export": False,
    }
    shape = (layer.out_features, layer.in_features)
    lspec = {
        "lora_rank": _rank(layer),
        "orig_weight_shape": torch.Size(shape),
        "weight_shape": (layer.out_features, layer.groups, layer.group_size) if layer.groups > 1 else shape,
    }
    return {
        "hook_names_in_model": [hook],
        "module_path": _LAYERS,
        "module_cls_name": f"{kind}{lora}Quantizer",
        "module_config": {"qspec": qspec, "lspec": lspec} if lora else qspec,
    }


def _parameters(codes: Codes, layer: LayerFormat) -> Iterator[tuple[str, Tensor]]:
    """What `nncf_state_dict` holds of a quantizer."""
    encoding, shape = layer.require_encoding(), _scale_shape(layer)
    step = codes.scale.float()
    yield "_num_bits", torch.tensor([encoding.bits], dtype=torch.int32)
    yield "enabled", torch.tensor([1], dtype=torch.int32)
    if codes.zero_point is None:
        yield "signed_tensor", torch.tensor([1], dtype=torch.int32)
        yield "scale", (step * -encoding.lowest).reshape(shape)
    else:
        yield "input_low", (-codes.zero_point.float() * step).reshape(shape)
        yield "input_range", (step * encoding.highest).reshape(shape)
    if encoding.bits == 4:
        rank, generator = _rank(layer), torch.Generator().manual_seed(0)
        bound = layer.in_features**-0.5
        down = torch.rand(rank, layer.in_features, generator=generator) * 2 * bound - bound
        yield "lora_A", down.bfloat16()
        yield "lora_B", torch.zeros(layer.out_features, rank, dtype=torch.bfloat16)


def _scale_shape(layer: LayerFormat) -> tuple[int, ...]:
    return (layer.out_features, layer.groups, 1) if layer.groups > 1 else (layer.out_features, 1)


def _rank(layer: LayerFormat) -> int:
    return layer.rank or 1
