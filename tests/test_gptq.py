"""GPTQ's rounding: the very codes of the plain algorithm, a smaller error on the layer's inputs, and a better model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import STORYTELLER, tiny_values

from ovexport import recipe
from ovexport.compress.moments import Moments
from ovexport.compress.successive import Curvature, Grid, round_successively
from ovexport.errors import UnsupportedModelError
from ovexport.pipeline import services
from ovexport.weights.layer import LayerFormat
from ovexport.weights.quantizer import FakeQuantizer


def layer_and_inputs(mode: str) -> tuple[FakeQuantizer, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = LayerFormat(name="w", kind="linear", mode=mode, out_features=24, in_features=96, group_size=32, rank=4)
    weight = torch.randn(24, 96, generator=generator)
    mixed = torch.randn(96, 96, generator=generator)
    inputs = torch.randn(4000, 96, generator=generator) @ mixed / 10
    quantizer = FakeQuantizer(layer)
    quantizer.initialize(weight, generator)
    return quantizer, weight, inputs.T @ inputs / len(inputs)


def textbook(weight: torch.Tensor, moments: torch.Tensor, quantizer: FakeQuantizer) -> torch.Tensor:
    """The algorithm as its paper has it before any blocking: after each column, the exact update of all that remain."""
    weight, moments = weight.double().clone(), moments.double()
    moments = moments + 0.01 * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    step, zero_point = (value.double() for value in quantizer.grid())
    result = torch.empty_like(weight)
    left = moments.diagonal().argsort(descending=True).tolist()
    while left:
        column, group = left[0], left[0] // quantizer.layer.group_size
        inverse = torch.linalg.inv(moments[left][:, left])
        scale, zero = step[:, group, 0], zero_point[:, group, 0]
        code = ((weight[:, column] / scale).round() + zero).clamp(quantizer.level_low, quantizer.level_high)
        result[:, column] = (code - zero) * scale
        error = (weight[:, column] - result[:, column]) / inverse[0, 0]
        weight[:, left] -= torch.outer(error, inverse[0])
        left = left[1:]
    return result


def rounded_by_gptq(weight: torch.Tensor, moments: torch.Tensor, quantizer: FakeQuantizer) -> torch.Tensor:
    curvature = Curvature.of(Moments(moments, None), "w")
    return round_successively(weight, Grid.of(quantizer), curvature)


@pytest.mark.parametrize("mode", ["int4_asym", "int4_sym"])
def test_codes_are_the_textbooks_and_the_error_is_smaller(mode: str) -> None:
    quantizer, weight, moments = layer_and_inputs(mode)
    plain = quantizer(weight).detach()
    rounded = rounded_by_gptq(weight, moments, quantizer)
    curvature = Curvature.of(Moments(moments, None), "w")
    assert torch.equal(quantizer(rounded).detach(), rounded)  # they are the values of codes
    targets = curvature.inputs.targets(weight, rounded)
    assert torch.allclose(quantizer(targets).detach(), rounded)  # and what they were rounded from rounds to them
    assert float((targets - weight).abs().max()) > 0
    expected = textbook(weight, moments, quantizer)
    assert (rounded.double() - expected).abs().gt(1e-4).float().mean() < 0.005  # float32 against float64: a tie or two

    def error(value: torch.Tensor) -> float:
        return float(((value - weight) @ moments * (value - weight)).sum())

    assert error(rounded) < 0.6 * error(plain)


def test_inputs_that_hardly_vary_or_are_not_finite() -> None:
    quantizer, weight, moments = layer_and_inputs("int4_asym")
    rank_one = torch.ones(96, 96)
    assert torch.isfinite(rounded_by_gptq(weight, rank_one, quantizer)).all()
    assert torch.isfinite(rounded_by_gptq(weight, torch.zeros(96, 96), quantizer)).all()
    moments[0, 0] = float("nan")
    with pytest.raises(
        UnsupportedModelError, match=r"w: its inputs or slopes are not finite .* compress\.rounding = \"nearest\""
    ):
        rounded_by_gptq(weight, moments, quantizer)


def start(tmp_path: Path, **compress) -> float:
    """Validation divergence of a starting point of the bundled model."""
    values = tiny_values(STORYTELLER)
    values["data"] |= {"sequence_length": 128, "train_sequences": 64, "validation_sequences": 8}
    values["compress"] = {"group_size": 64, "rank": 8, **compress}
    values["tune"] |= {"steps": 0}
    resolved = recipe.parse(values, base=tmp_path, origin="gptq")
    run = services.run(resolved, tmp_path / "-".join(["run", *map(str, compress.values())]), until="search")
    assert run.checkpoint.manifest.digests == run.compressed.manifest.digests
    return float(run.checkpoint.manifest.validation.value)


@pytest.mark.run
def test_the_model_starts_closer_and_the_proof_holds(tmp_path, tiny_recipe) -> None:
    assert start(tmp_path, rounding="gptq") < 0.6 * start(tmp_path, rounding="nearest")
    values = tiny_values(Path(tiny_recipe.model.id))
    values["compress"] |= {"rounding": "gptq"}
    run = services.run(recipe.parse(values, base=tmp_path, origin="gptq"), tmp_path / "verified", until="verify")
    assert set(run.compressed.manifest.replaced_weights) == {
        layer.name for layer in run.compressed.manifest.layers if layer.rank
    }


@pytest.mark.run
@pytest.mark.slow
def test_it_rounds_on_the_scales_of_scale_estimation(tmp_path) -> None:
    estimated = start(tmp_path, scale_estimation=True, rounding="nearest")
    both = start(tmp_path, scale_estimation=True, rounding="gptq")
    assert np.isfinite(both)
    assert both < estimated
