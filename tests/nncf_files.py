"""Checkpoint files as NNCF's examples save them, what NNCF's own export packs of one, and what ours does."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ovexport.artifacts import Checkpoint
from ovexport.models.architecture import parameter_of_hook
from ovexport.models.loading import load_model
from ovexport.models.matrix_view import matrix_view
from ovexport.openvino.graph import nibbles
from ovexport.recipe import ModelSpec
from ovexport.storage.tensorfile import TensorFile
from ovexport.verify.arithmetic import row_blocks
from ovexport.verify.nncf_arithmetic import NncfCodes, nncf_grid
from ovexport.weights.layer import LayerFormat
from ovexport.weights.nncf_quantizer import NncfQuantizer

RANK = 8
EXAMPLE_INPUT = {"input_ids": torch.arange(16).reshape(1, 16)}


@dataclass(frozen=True)
class Example:
    """Makes an example's checkpoint file of the tiny model: compressed by NNCF, "tuned" at random, saved."""

    base: Path
    folder: Path

    def __call__(self, mode: str = "int4_asym", form: str = "FQ_LORA", *, model_state: bool = False, **options) -> Path:
        import nncf
        import nncf.torch
        from nncf.torch.function_hook.wrapper import get_hook_storage

        if "backup_mode" in options:
            options["backup_mode"] = nncf.BackupMode(options["backup_mode"])
        model = nncf.compress_weights(
            load_model(ModelSpec(id=str(self.base)), dtype=torch.bfloat16),
            mode=nncf.CompressWeightsMode(mode),
            group_size=32,
            dataset=nncf.Dataset([EXAMPLE_INPUT]),
            compression_format=nncf.CompressionFormat[form],
            advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=RANK),
            **options,
        )
        generator = torch.Generator().manual_seed(0)
        for module in get_hook_storage(model).modules():
            if not hasattr(module, "lora_A"):
                continue
            for name, parameter in module.get_trainable_params().items():
                noise = torch.randn(parameter.shape, generator=generator)
                with torch.no_grad():
                    if name.startswith("lora"):
                        parameter.copy_(noise * (0.01 if name == "lora_B" else 0.5))
                    else:
                        parameter.mul_(1 + 0.02 * noise)
        hook_storage = get_hook_storage(model)
        content = {"nncf_state_dict": hook_storage.state_dict(), "nncf_config": nncf.torch.get_config(model)}
        if model_state:
            content["model_state"] = model.state_dict()
        path = self.folder / f"{mode}-{form}-{len(list(self.folder.iterdir()))}.pth"
        torch.save(content, path)
        return path


Packed = dict[str, dict[str, np.ndarray]]
"""By layer its `codes`, (output, input), `scale` and, where asymmetric, `zero_point`, one dimension each."""


def our_codes(checkpoint: Checkpoint, spec: ModelSpec) -> Packed:
    """What strip packs, which is what the proof computes anew with NumPy alone."""
    network = load_model(spec)
    packed: Packed = {}
    for layer in checkpoint.manifest.packed:
        weight = matrix_view(network, layer.name).read()
        if layer.name in checkpoint.manifest.replaced_weights:
            weight = torch.from_numpy(np.array(checkpoint.weights.require(layer.name)))
        quantized = NncfQuantizer.load(layer, checkpoint.adapters).quantize(weight)
        assert quantized.digest() == checkpoint.manifest.digests[layer.name]
        parts = {"codes": quantized.codes, "scale": quantized.scale.reshape(-1)}
        if quantized.zero_point is not None:
            parts["zero_point"] = quantized.zero_point.reshape(-1)
        packed[layer.name] = {name: value.numpy() for name, value in parts.items()}
        proven = recomputed(layer, weight.float().numpy(), checkpoint.adapters)
        assert differences({layer.name: proven}, {layer.name: packed[layer.name]}) == {}
    return packed


def recomputed(layer: LayerFormat, weight: np.ndarray, adapters: TensorFile) -> dict[str, np.ndarray]:
    """The same as the proof computes it."""
    grid, expected = nncf_grid(layer, adapters), NncfCodes(layer, adapters)
    codes = np.concatenate([expected.rows(weight[rows].copy(), rows) for rows in row_blocks(layer)])
    parts = {"codes": codes, "scale": grid.scale.reshape(-1)}
    return parts if grid.zero_point is None else parts | {"zero_point": grid.zero_point.reshape(-1)}


def nncf_model(path: Path, spec: ModelSpec, ranks: list[int] | None = None):
    """The tuned model as the examples' load_checkpoint and export load it, in float32."""
    import nncf.torch
    from nncf.torch.function_hook.wrapper import get_hook_storage

    content = torch.load(path, weights_only=False)
    model = nncf.torch.load_from_config(load_model(spec, dtype=torch.float32), content["nncf_config"])
    if "model_state" in content:
        model.load_state_dict(content["model_state"])
    get_hook_storage(model).load_state_dict(content["nncf_state_dict"])
    for name, module in get_hook_storage(model).named_hooks():
        if ranks and hasattr(module, "set_active_rank"):
            module.set_active_rank(ranks[int(name.split("layers:")[1].split(":")[0])])
    return model


def stripped(model):
    """The model as their export strips it."""
    import nncf

    with torch.compiler.set_stance("force_eager"):
        return nncf.strip(model, do_copy=False, strip_format=nncf.StripFormat.DQ, example_input=EXAMPLE_INPUT)


def nncf_codes(path: Path, spec: ModelSpec, ranks: list[int] | None = None) -> Packed:
    """What NNCF packs of a file."""
    return stripped_codes(nncf_model(path, spec, ranks))


def stripped_codes(model) -> Packed:
    """What NNCF packs of a tuned model, which is not one afterwards."""
    from nncf.torch.function_hook.wrapper import get_hook_storage

    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    model = stripped(model)
    packed: Packed = {}
    for hook, module in get_hook_storage(model).named_hooks():
        name, kind = parameter_of_hook(hook), type(module).__name__
        four_bits, offset = "INT4" in kind, 8 if kind.startswith("INT4Sym") else 0
        stored = {"codes": model.get_parameter(name).detach(), "zero_point": getattr(module, "_zero_point", None)}
        parts = {
            part: (nibbles(value.numpy().reshape(-1)) if four_bits else value.numpy()).astype(np.int16) - offset
            for part, value in stored.items()
            if value is not None
        }
        parts["codes"] = parts["codes"].reshape(shapes[name])
        packed[name] = parts | {"scale": module._scale.numpy()}
    return packed


def differences(left: Packed, right: Packed) -> dict[str, int]:
    """How many entries differ, by layer and part; those without a difference are left out."""
    assert {name: parts.keys() for name, parts in left.items()} == {name: parts.keys() for name, parts in right.items()}
    counts = {
        f"{name} {part}": int(np.count_nonzero(left[name][part].reshape(-1) != right[name][part].reshape(-1)))
        for name in left
        for part in left[name]
    }
    return {place: count for place, count in counts.items() if count}
