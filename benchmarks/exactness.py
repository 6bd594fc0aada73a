"""Is the exported model the tuned one? NNCF's fake quantizers with its documented export, and ovexport.

python benchmarks/exactness.py [--json] [--save]

Both sides tune the bundled model in its dtype, bfloat16; adapters are moved at random, as tuning would move them. NNCF:
the codes that its quantizers use in bfloat16 are compared with those of the same checkpoint loaded in float32, stripped
and exported as documented. Ours: the codes of the last step are compared with those in the IR. Logits: the tuned
model's in torch are compared with the IR's (float32 arithmetic, float32 KV cache, no dynamic quantization); the figure
is the largest difference divided by the range of the logits.
"""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import command
import numpy as np
import torch
from shapes import REPOSITORY, convert_moved

from ovexport.artifacts import IR, RunFolder
from ovexport.models.architecture import parameter_of_hook
from ovexport.models.loading import load_model
from ovexport.models.matrix_view import matrix_view
from ovexport.openvino.graph import nibbles, read_graph, weights
from ovexport.openvino.matrices import layer_matrices
from ovexport.openvino.runtime import LogitsRunner
from ovexport.progress import silent
from ovexport.recipe import CompressSpec, ModelSpec
from ovexport.verify.codes import arithmetic
from ovexport.versions import stack_versions
from ovexport.weights.adapters import load_quantizer

MODEL = REPOSITORY / "models" / "storyteller-4m"
GROUP_SIZE, RANK = 32, 32
TOKENS = np.random.default_rng(0).integers(2, 2048, (4, 64))


def main() -> None:
    """Measure both ways and show the differences."""
    parser = command.parser(__doc__, "exactness", "nothing to shorten: it takes a minute")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        document = {
            "differences": {
                "NNCF, as documented": nncf_differences(Path(folder)),
                "ovexport": differences(Path(folder)),
            },
            "conditions": {
                "model": MODEL.name,
                "mode": "int4_asym",
                "group_size": GROUP_SIZE,
                "rank": RANK,
                "tokens": list(TOKENS.shape),
                "adapters": "moved at random, standard deviation 0.002",
            },
            "versions": stack_versions(),
        }
    command.publish(document, "exactness", options)


def differences(folder: Path) -> dict[str, float]:
    """Ours."""
    spec = CompressSpec(group_size=GROUP_SIZE, rank=RANK, rounding="nearest")
    run = convert_moved(ModelSpec(id=str(MODEL)), folder, spec)
    manifest = run.checkpoint.manifest
    found = weights(read_graph(run.ir("int4")))
    matrices = layer_matrices(read_graph(run.ir("bf16")), manifest)
    mismatches = arithmetic(found, run.checkpoint, manifest, matrices, silent)
    shares = {}
    for bits in (4, 8):
        layers = [layer for layer in manifest.packed if layer.require_encoding().bits == bits]
        differing = sum(mismatches[layer.name].codes for layer in layers)
        shares[bits] = differing / sum(layer.out_features * layer.in_features for layer in layers)
    scales = sum(layer.out_features * layer.groups for layer in manifest.packed)
    return {
        "int4_codes": shares[4],
        "int8_codes": shares[8],
        "scales": sum(found.scales for found in mismatches.values()) / scales,
        "logits": _error(run.ir("int4"), _tuned_logits(run)),
    }


def _tuned_logits(run: RunFolder) -> np.ndarray:
    network = load_model(ModelSpec(id=str(MODEL)), dtype=torch.float32)
    for layer in run.checkpoint.manifest.packed:
        weight = matrix_view(network, layer.name).read()
        weight.copy_(load_quantizer(layer, run.checkpoint.adapters)(weight).detach())
    return _logits(network)


def nncf_differences(folder: Path) -> dict[str, float]:
    """NNCF's, exported as its examples do."""
    import nncf
    import nncf.torch
    from nncf.torch.function_hook.wrapper import get_hook_storage
    from optimum.exporters.openvino.convert import export_from_model

    example = {"input_ids": torch.arange(16).reshape(1, 16)}
    tuned = nncf.compress_weights(
        load_model(ModelSpec(id=str(MODEL))),
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=GROUP_SIZE,
        ratio=1.0,
        dataset=nncf.Dataset([example]),
        compression_format=nncf.CompressionFormat.FQ_LORA,
        advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=RANK),
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if name.endswith("lora_B"):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(2e-3 * noise)
    logits = _logits(tuned)
    used = _stripped(copy.deepcopy(tuned), example)

    again = nncf.torch.load_from_config(
        load_model(ModelSpec(id=str(MODEL)), dtype=torch.float32), nncf.torch.get_config(tuned)
    )
    get_hook_storage(again).load_state_dict(get_hook_storage(tuned).state_dict())
    scales = _trained_scales(again)
    exported = _stripped(again, example)
    export_from_model(exported, folder / "documented", device="cpu")
    shares = {bits: _share_of_differing_codes(used, exported, bits) for bits in (4, 8)}
    shipped = torch.cat([value.float().reshape(-1) for value in _shipped_scales(exported)])
    return {
        "int4_codes": shares[4],
        "int8_codes": shares[8],
        "scales": float((shipped != scales).float().mean()),
        "logits": _error(IR(folder / "documented"), logits),
    }


def _stripped(model: Any, example: dict[str, torch.Tensor]) -> Any:
    import nncf

    return nncf.strip(model, do_copy=False, strip_format=nncf.StripFormat.DQ, example_input=example)


def _trained_scales(model: Any) -> torch.Tensor:
    """The float32 scales that NNCF's quantizers train, in the order of its hooks."""
    from nncf.torch.function_hook.wrapper import get_hook_storage

    modules = [module for _, module in get_hook_storage(model).named_hooks()]
    return torch.cat(
        [(module.input_range.detach().float().abs() / (module.levels - 1)).reshape(-1) for module in modules]
    )


def _shipped_scales(model: Any) -> list[torch.Tensor]:
    from nncf.torch.function_hook.wrapper import get_hook_storage

    return [module._scale for _, module in get_hook_storage(model).named_hooks()]


def _share_of_differing_codes(used: Any, exported: Any, bits: int) -> float:
    from nncf.torch.function_hook.wrapper import get_hook_storage

    differing = count = 0
    for hook, decompressor in get_hook_storage(exported).named_hooks():
        if not type(decompressor).__name__.startswith(f"INT{bits}"):
            continue
        name = parameter_of_hook(hook)
        ours, other = (model.get_parameter(name).detach().reshape(-1).numpy() for model in (used, exported))
        if bits == 4:
            ours, other = nibbles(ours), nibbles(other)
        differing += int(np.count_nonzero(ours != other))
        count += ours.size
    return differing / count


def _logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(TOKENS)).logits.float().numpy()


def _error(ir: IR, expected: np.ndarray) -> float:
    actual = LogitsRunner(read_graph(ir), ir.path.name)(TOKENS)
    return float((np.abs(actual - expected).max(-1) / np.ptp(expected, axis=-1)).max())


if __name__ == "__main__":
    main()
