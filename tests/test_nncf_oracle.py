"""NNCF is the oracle: the same starting ranges, the same fake-quantized weights, the same codes after its own strip."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ovexport.artifacts import IR
from ovexport.convert import convert
from ovexport.models.architecture import Architecture, parameter_of_hook
from ovexport.models.checkpoint import write_checkpoint
from ovexport.models.loading import load_model
from ovexport.models.matrix_view import matrix_view, weight_digest
from ovexport.openvino.graph import read_graph
from ovexport.openvino.runtime import LogitsRunner
from ovexport.recipe import CompressSpec, ConvertSpec, ModelSpec
from ovexport.strip import packed_tensors, strip
from ovexport.trace.stage import trace
from ovexport.weights.plan import plan_layers
from ovexport.weights.quantizer import FakeQuantizer

pytestmark = [pytest.mark.families, pytest.mark.slow]


@pytest.fixture(scope="module", params=["int4_asym", "int4_sym"])
def compressed(request, tiny_model: Path):
    """The tiny model in float32 compressed by NNCF with FQ_LORA, and its quantizers by parameter."""
    import nncf
    from nncf.torch.function_hook.wrapper import get_hook_storage

    network = load_model(ModelSpec(id=str(tiny_model)), dtype=torch.float32)
    example = {"input_ids": torch.arange(16).reshape(1, 16)}
    model = nncf.compress_weights(
        network,
        mode=nncf.CompressWeightsMode(request.param),
        group_size=32,
        ratio=1.0,
        dataset=nncf.Dataset([example]),
        compression_format=nncf.CompressionFormat.FQ_LORA,
        advanced_parameters=nncf.AdvancedCompressionParameters(lora_adapter_rank=4),
    )
    quantizers = {parameter_of_hook(name): module for name, module in get_hook_storage(model).named_hooks()}
    return request.param, model, quantizers, example


def ours(mode: str, tiny_model: Path) -> tuple[dict[str, FakeQuantizer], dict[str, torch.Tensor]]:
    """Our quantizers of the same model, rounded to nearest, and the weights."""
    network = load_model(ModelSpec(id=str(tiny_model)), dtype=torch.float32)
    layers = plan_layers(Architecture(network).matrices(), CompressSpec(mode=mode, group_size=32, rank=4))
    weights = {layer.name: matrix_view(network, layer.name).read() for layer in layers}
    quantizers = {layer.name: FakeQuantizer(layer) for layer in layers}
    for name, quantizer in quantizers.items():
        quantizer.initialize(weights[name], torch.Generator().manual_seed(0))
    return quantizers, weights


def test_the_same_layers_start_from_the_same_steps(compressed, tiny_model: Path) -> None:
    mode, _, theirs, _ = compressed
    quantizers, _ = ours(mode, tiny_model)
    assert set(quantizers) == set(theirs)
    for name, quantizer in quantizers.items():
        step, zero_point = quantizer.grid()
        if quantizer.symmetric:
            expected = theirs[name].scale.detach().float().reshape(step.shape) / 8
        else:
            expected = theirs[name].input_range.detach().float().reshape(step.shape) / quantizer.level_high
            low = theirs[name].input_low.detach().float().reshape(step.shape)
            distance = (torch.round(-low / expected) - zero_point).abs()
            assert distance.max() <= 1, name
            assert (distance == 0).float().mean() > 0.95, name
        # Ours lies on the float16 grid, which is 2^-11 away at most, and moves a zero point now and then.
        assert torch.allclose(step, expected, rtol=2**-10, atol=2**-22), name


@pytest.fixture(scope="module")
def same_parameters(compressed, tiny_model: Path):
    """Our quantizers and NNCF's with the same moved adapters and the same ranges."""
    mode, _, theirs, _ = compressed
    quantizers, weights = ours(mode, tiny_model)
    generator = torch.Generator().manual_seed(1)
    for name, quantizer in quantizers.items():
        with torch.no_grad():
            target = theirs[name]
            if quantizer.layer.rank:
                quantizer.lora_B.copy_(torch.randn(quantizer.lora_B.shape, generator=generator) * 0.02)
                for part in ("lora_A", "lora_B"):  # NNCF keeps adapters in bfloat16
                    rounded = getattr(quantizer, part).bfloat16().float()
                    getattr(quantizer, part).copy_(rounded)
                    setattr(target, part, torch.nn.Parameter(rounded))
            step, zero_point = quantizer.grid()
            if quantizer.symmetric:
                target.scale = torch.nn.Parameter((step * 8).reshape(target.scale.shape))
            else:
                shape = target.input_low.shape
                target.input_low = torch.nn.Parameter((-zero_point * step).reshape(shape))
                target.input_range = torch.nn.Parameter((step * quantizer.level_high).reshape(shape) - target.eps)
    return quantizers, weights


@pytest.fixture(scope="module")
def stripped(compressed, same_parameters):
    """The model as NNCF's DQ strip leaves it."""
    import nncf

    _, model, _, example = compressed
    return nncf.strip(model, do_copy=True, strip_format=nncf.StripFormat.DQ, example_input=example)


def test_nncfs_strip_gives_the_codes_that_ours_gives(same_parameters, stripped) -> None:
    """With the same adapters and our ranges put into NNCF's quantizers, DQ strip packs the very same codes."""
    from nncf.torch.function_hook.wrapper import get_hook_storage

    quantizers, weights = same_parameters
    decompressors = {parameter_of_hook(name): module for name, module in get_hook_storage(stripped).named_hooks()}
    for name, quantizer in quantizers.items():
        expected = packed_tensors(quantizer.quantize(weights[name]), quantizer.encoding)["codes"]
        if quantizer.symmetric:
            expected = np.bitwise_xor(expected, 0x88)  # NNCF stores signed nibbles with an offset of 8
        actual = stripped.get_parameter(name).detach().contiguous().view(torch.uint8).reshape(-1).numpy()
        assert actual.size == expected.size, name
        differing = np.count_nonzero(actual != expected) / expected.size
        # NNCF divides and rounds twice; a value half way between two codes may fall to the other side.
        assert differing < 2e-3, (name, differing)
        scale = decompressors[name]._scale.float().reshape(-1)
        assert torch.allclose(scale, quantizer.grid()[0].reshape(-1), rtol=2**-10, atol=2**-22), name


def test_nncfs_strip_and_optimums_export_give_the_outputs_that_ours_gives(
    same_parameters, stripped, tiny_model: Path, tmp_path: Path
) -> None:
    from optimum.exporters.openvino.convert import export_from_model

    quantizers, weights = same_parameters
    export_from_model(stripped, tmp_path / "documented", device="cpu")
    model = ModelSpec(id=str(tiny_model))
    base = trace(model, ConvertSpec(), tmp_path / "bf16")
    layers = tuple(quantizer.layer for quantizer in quantizers.values())
    originals = {name: matrix_view(load_model(model), name).read() for name in weights}
    digests = {name: weight_digest(weight) for name, weight in originals.items()}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model, layers, digests, originals, quantizers, {})
    product = convert(base, strip(checkpoint, base, tmp_path / "packed"), tmp_path / "int4")
    tokens = np.random.default_rng(0).integers(2, 2048, (4, 64))
    actual, expected = (
        LogitsRunner(read_graph(ir), ir.path.name)(tokens).copy() for ir in (product, IR(tmp_path / "documented"))
    )
    untuned = LogitsRunner(read_graph(base), "bf16")(tokens)
    # A code that fell to the other side of a tie moves a logit a little; tuning moves it a hundred times as far.
    assert np.abs(actual - expected).max() < 1e-3 * np.ptp(expected)
    assert np.abs(actual - untuned).max() > 0.1 * np.ptp(expected)
