import numpy as np
import pytest
import torch

from ovexport.storage.tensorfile import TensorFile, write_tensors
from ovexport.verify.arithmetic import ExpectedCodes, ExpectedGrid, expected_grid, row_blocks
from ovexport.weights.layer import LayerFormat
from ovexport.weights.quantizer import FakeQuantizer

MODES = ["int4_asym", "int4_sym", "int8_asym", "int8_sym"]


def layer_format(mode: str, *, group_size: int = 16, rank: int = 4) -> LayerFormat:
    rank = 0 if mode.startswith("int8") else rank
    return LayerFormat(
        name="w", kind="linear", mode=mode, out_features=24, in_features=32, group_size=group_size, rank=rank
    )


def tuned_quantizer(layer: LayerFormat, weight: torch.Tensor, seed: int = 0) -> FakeQuantizer:
    """A quantizer as tuning leaves it: adapters and ranges moved off their starting point."""
    generator = torch.Generator().manual_seed(seed)
    quantizer = FakeQuantizer(layer)
    quantizer.initialize(weight, generator)
    with torch.no_grad():
        for name, parameter in quantizer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.02 if name.startswith("lora") else 0.05 * parameter.abs().mean()))
    return quantizer


def recomputed(layer: LayerFormat, weight: torch.Tensor, quantizer: FakeQuantizer, folder) -> tuple:
    """Grid and codes as the proof computes them from a checkpoint with the quantizer's parameters."""
    tensors = {f"{layer.name}.{key}": value.numpy() for key, value in quantizer.stored().items()}
    write_tensors(tensors, folder / "adapters.safetensors")
    adapters = TensorFile(folder / "adapters.safetensors")
    grid: ExpectedGrid = expected_grid(layer, adapters)
    expected = ExpectedCodes(layer, adapters)
    floats = weight.float().numpy()
    return grid, np.concatenate([expected.rows(floats[rows].copy(), rows) for rows in row_blocks(layer)])


@pytest.mark.parametrize("mode", MODES)
def test_rounding_to_nearest_is_off_by_half_a_step_at_most(mode: str) -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    quantizer = FakeQuantizer(layer_format(mode))
    quantizer.initialize(weight, torch.Generator().manual_seed(0))
    step = quantizer.grid()[0].abs().expand(24, 2, 16).reshape(24, 32)
    # The zero point is rounded and the step lies on the float16 grid: the outermost value may be clipped by as much.
    assert ((quantizer(weight) - weight).abs() <= step * 1.01).all()
    assert ((quantizer(weight) - weight).abs() <= step * 0.5001).float().mean() > 0.9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [8, 32])
def test_trained_values_packed_codes_and_numpy_agree_bit_for_bit(mode, dtype, group_size, tmp_path) -> None:
    layer = layer_format(mode, group_size=group_size)
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    quantizer = tuned_quantizer(layer, weight)
    codes = quantizer.quantize(weight)

    zero_point = 0 if codes.zero_point is None else codes.zero_point.float()
    grouped = codes.codes.float().reshape(24, layer.groups, group_size)
    dequantized = ((grouped - zero_point) * codes.scale.float()).reshape(24, 32)
    assert torch.equal(dequantized, quantizer(weight).detach())

    grid, expected = recomputed(layer, weight, quantizer, tmp_path)
    assert np.array_equal(expected, codes.codes.numpy())
    assert np.array_equal(grid.scale, codes.scale.reshape(24, -1).numpy())
    if codes.zero_point is not None:
        assert np.array_equal(grid.zero_point, codes.zero_point.reshape(24, -1).numpy())


def test_large_matrices_are_quantized_and_recomputed_block_by_block_all_the_same(tmp_path) -> None:
    layer = LayerFormat(
        name="w", kind="linear", mode="int4_asym", out_features=3001, in_features=700, group_size=35, rank=8
    )
    weight = torch.randn(3001, 700, generator=torch.Generator().manual_seed(2)).bfloat16()
    quantizer = tuned_quantizer(layer, weight)
    codes = quantizer.quantize(weight).codes
    zero_point = quantizer.grid()[1]
    whole = (quantizer(weight).detach().reshape(3001, 20, 35) / quantizer.grid()[0] + zero_point).round()
    assert torch.equal(codes, whole.reshape(3001, 700).to(torch.uint8))
    assert np.array_equal(recomputed(layer, weight, quantizer, tmp_path)[1], codes.numpy())


@pytest.mark.parametrize("mode", ["int4_asym", "int4_sym"])
@pytest.mark.parametrize("active_rank", [0, 1, 3])
def test_of_an_adapter_only_the_active_rank_counts(mode: str, active_rank: int, tmp_path) -> None:
    layer = layer_format(mode).model_copy(update={"active_rank": active_rank})
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(2))
    quantizer = tuned_quantizer(layer, weight)
    codes = quantizer.quantize(weight).codes
    assert np.array_equal(recomputed(layer, weight, quantizer, tmp_path)[1], codes.numpy())
    whole = tuned_quantizer(layer_format(mode), weight)
    assert not torch.equal(codes, whole.quantize(weight).codes)
    with torch.no_grad():
        whole.lora_A[active_rank:] = 0
    assert torch.equal(codes, whole.quantize(weight).codes)
    quantizer(weight).sum().backward()
    assert (quantizer.lora_A.grad[active_rank:] == 0).all()
    assert (quantizer.lora_B.grad[:, active_rank:] == 0).all()


@pytest.mark.parametrize("mode", ["int4_asym", "int4_sym"])
def test_a_negative_scale_survives(mode: str, tmp_path) -> None:
    layer = layer_format(mode)
    weight = torch.randn(24, 32)
    quantizer = tuned_quantizer(layer, weight)
    with torch.no_grad():
        getattr(quantizer, quantizer.range_names[0]).neg_()
    assert torch.isfinite(quantizer(weight)).all()
    expected = recomputed(layer, weight, quantizer, tmp_path)[1]
    assert np.array_equal(expected, quantizer.quantize(weight).codes.numpy())


def straight_through(quantizer: FakeQuantizer, weight: torch.Tensor, parameters: dict) -> torch.Tensor:
    """The same function built of differentiable steps; rounding and the float16 grid pass gradients unchanged."""

    def passing(value: torch.Tensor, replaced: torch.Tensor) -> torch.Tensor:
        return value + (replaced - value).detach()

    adapted = weight + parameters["lora_B"] @ parameters["lora_A"]
    grouped = adapted.reshape(24, -1, quantizer.layer.group_size)
    fixed_step, fixed_zero = quantizer.grid()
    if quantizer.symmetric:
        step, low = passing(parameters["scale"] / 8, fixed_step), torch.tensor(-8.0)
    else:
        step = passing(parameters["input_range"] / 15, fixed_step)
        low = -passing(parameters["zero_point"], fixed_zero)
    position = grouped / step
    inside = passing(position, position.round())
    clipped = torch.where(position < low, low, torch.where(position > low + 15, low + 15, inside))
    return (clipped * step).reshape(weight.shape)


@pytest.mark.parametrize("mode", ["int4_asym", "int4_sym"])
@pytest.mark.parametrize("sign", [1, -1])
def test_gradients_are_those_of_straight_through_estimation(mode: str, sign: int) -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(3))
    quantizer = tuned_quantizer(layer_format(mode), weight)
    with torch.no_grad():  # some values are clipped on both sides
        getattr(quantizer, quantizer.range_names[0]).mul_(0.8 * (sign if quantizer.symmetric else 1))
        quantizer.lora_B.zero_()  # the sum W + B·A is float32; without it the two sides start from the same numbers
    gradient = torch.randn(24, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    parameters = {name: value.detach().double().requires_grad_() for name, value in quantizer.named_parameters()}
    straight_through(quantizer, weight.double(), parameters).backward(gradient)
    found = quantizer.gradients(weight, gradient)
    for name, parameter in parameters.items():
        scale = float(parameter.grad.abs().max())
        assert torch.allclose(found[name], parameter.grad, rtol=1e-6, atol=1e-6 * scale), name
    single = quantizer.gradients(weight, gradient.float())
    for name in parameters:
        assert torch.allclose(single[name].double(), found[name], rtol=1e-4, atol=1e-5), name


def test_gradient_of_clipped_and_inside_values_by_hand() -> None:
    layer = LayerFormat(name="w", kind="linear", mode="int4_asym", out_features=1, in_features=4, group_size=4, rank=1)
    quantizer = FakeQuantizer(layer)
    with torch.no_grad():
        quantizer.set_grid(torch.full((1, 1, 1), 0.125), torch.full((1, 1, 1), -0.5))  # zero point 4, range 1.875
    weight = torch.tensor([[-1.0, 0.26, 0.5, 9.0]])  # below, inside and off the grid, on the grid, above
    quantizer(weight).backward(torch.ones(1, 4))
    assert float(quantizer.zero_point.grad) == -2 * 0.125
    assert float(quantizer.input_range.grad) == pytest.approx((-4 + 11) / 15 + (0.25 - 0.26) / 1.875)


def test_a_group_whose_values_have_one_sign_is_not_clipped_to_one_value() -> None:
    layer = LayerFormat(name="w", kind="linear", mode="int4_asym", out_features=1, in_features=4, group_size=4, rank=1)
    weight = torch.tensor([[0.5, 0.6, 0.7, 0.8]])
    quantizer = FakeQuantizer(layer)
    quantizer.initialize(weight, torch.Generator())
    assert (quantizer(weight) - weight).abs().max() < 0.03


def test_learning_the_step_leaves_the_zero_point_where_it_is() -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(5))
    quantizer = FakeQuantizer(layer_format("int4_asym"))
    quantizer.initialize(weight, torch.Generator())
    before = quantizer.quantize(weight).zero_point
    with torch.no_grad():
        quantizer.input_range.mul_(1.2)
    assert torch.equal(quantizer.quantize(weight).zero_point, before)
    again = FakeQuantizer(quantizer.layer)
    again.load(quantizer.stored())
    assert torch.equal(again.quantize(weight).zero_point, before)
    assert torch.equal(again.quantize(weight).codes, quantizer.quantize(weight).codes)


@pytest.mark.parametrize("mode", ["int4_asym", "int4_sym"])
def test_the_range_is_found_again_by_descent(mode: str) -> None:
    """Gradients point the right way: with the adapters frozen, descent on the range lowers the error of a bad one."""
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(5))
    quantizer = FakeQuantizer(layer_format(mode))
    quantizer.initialize(weight, torch.Generator())
    with torch.no_grad():
        getattr(quantizer, quantizer.range_names[0]).mul_(1.5)
    optimizer = torch.optim.Adam([getattr(quantizer, quantizer.range_names[0])], lr=0.02)
    errors = []
    for _ in range(60):
        error = ((quantizer(weight) - weight) ** 2).mean()
        errors.append(float(error))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert min(errors[-10:]) < 0.75 * errors[0]
