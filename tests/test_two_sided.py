"""Two-sided rounding: the target of each entry, a cost that falls, moments as autograd gives them, and a model that
starts closer than GPTQ's."""

import errno
import os
from pathlib import Path
from tempfile import gettempdir

import pytest
import torch
from conftest import STORYTELLER, tiny_values
from torch import nn

from ovexport import recipe
from ovexport.compress import check
from ovexport.compress.moments import (
    LARGEST_OUTPUTS,
    Moments,
    add_products,
    mirrored,
    moments_by_block,
    slope_at_drawn_tokens,
)
from ovexport.compress.successive import (
    Curvature,
    Grid,
    exchange,
    fitted_steps,
    refined,
    round_successively,
)
from ovexport.errors import ArtifactError, UnsupportedModelError
from ovexport.models import blocks
from ovexport.models.architecture import Architecture
from ovexport.models.head import Head
from ovexport.models.loading import load_model
from ovexport.pipeline import services
from ovexport.recipe import CompressSpec, ModelSpec
from ovexport.weights.layer import LayerFormat
from ovexport.weights.plan import LayerPlan
from ovexport.weights.quantizer import FakeQuantizer

MODES = ["int4_asym", "int4_sym", "int8_asym"]


def correlated(size: int, generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(4000, size, generator=generator) @ torch.randn(size, size, generator=generator) / 10
    return values.T @ values / len(values)


def layer(mode: str, out_features: int = 40, in_features: int = 72) -> tuple[torch.Tensor, Grid, Moments]:
    generator = torch.Generator().manual_seed(0)
    group_size = in_features if mode == "int8_asym" else 24
    made = LayerFormat(
        name="w", kind="linear", mode=mode, out_features=out_features, in_features=in_features, group_size=group_size
    )
    weight = torch.randn(out_features, in_features, generator=generator)
    quantizer = FakeQuantizer(made)
    quantizer.initialize(weight, generator)
    moments = Moments(correlated(in_features, generator), correlated(out_features, generator))
    return weight, Grid.of(quantizer), moments


def entry_by_entry(weight: torch.Tensor, grid: Grid, curvature: Curvature) -> torch.Tensor:
    """The definition: each entry is rounded from what minimizes the cost over it and all that come after it."""
    rows, columns = curvature.outputs, curvature.inputs
    order = [(int(row), int(column)) for row in rows.order for column in columns.order]
    cost = torch.kron(rows.moments.double(), columns.moments.double())  # of errors, row by row
    step, zero_point = grid.spread(grid.step).double(), grid.spread(grid.zero_point).double()
    error = torch.zeros(weight.numel(), dtype=torch.float64)
    wide = weight.shape[1]
    left = [row * wide + column for row, column in order]
    done: list[int] = []
    for row, column in order:
        # the free errors that are best, given those that are settled, without any grid
        best = -torch.linalg.solve(cost[left][:, left], cost[left][:, done] @ error[done]) if done else error[left]
        target = weight[row, column].double() - best[0]
        code = ((target / step[row, column]).round() + zero_point[row, column]).clamp(grid.lowest, grid.highest)
        index = left.pop(0)
        error[index] = weight[row, column] - (code - zero_point[row, column]) * step[row, column]
        done.append(index)
    return weight - error.reshape(weight.shape).float()


@pytest.mark.parametrize("mode", MODES)
def test_every_entry_is_rounded_from_the_best_that_those_after_it_allow(mode: str) -> None:
    weight, grid, moments = layer(mode, 10, 24)
    curvature = Curvature.of(moments, "w")
    assert torch.allclose(
        round_successively(weight, grid, curvature), entry_by_entry(weight, grid, curvature), atol=1e-5
    )


def test_tiles_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grid, moments = layer("int4_asym", 45, 72)
    curvature = Curvature.of(moments, "w")
    expected = round_successively(weight, grid, curvature)
    monkeypatch.setattr("ovexport.compress.successive.TILE", 128)  # a single tile
    assert torch.equal(round_successively(weight, grid, curvature), expected)


@pytest.mark.parametrize("mode", MODES)
def test_both_sides_cost_less_than_one_and_each_refinement_costs_less_again(mode: str) -> None:
    weight, grid, moments = layer(mode)
    curvature = Curvature.of(moments, "w")
    one_sided = Curvature.of(Moments(moments.inputs, None), "w")
    nearest = (weight / grid.spread(grid.step)).round() * grid.spread(grid.step)
    values = {
        "nearest": nearest,
        "one side": round_successively(weight, grid, one_sided),
        "two sides": round_successively(weight, grid, curvature),
    }
    values["exchanged"] = exchange(weight, values["two sides"], grid, curvature)
    values["refined"], fitted = refined(weight, grid, curvature)
    costs = [curvature.damped.cost(weight - value) for value in values.values()]
    assert costs == sorted(costs, reverse=True)
    assert costs[-2] < costs[-3] < 0.8 * costs[1]
    assert costs[-1] < costs[-2] or mode == "int8_asym"  # steps of large groups are not fitted
    codes = values["refined"] / fitted.spread(fitted.step) + fitted.spread(fitted.zero_point)
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    assert float(codes.min()) > fitted.lowest - 0.5
    assert float(codes.max()) < fitted.highest + 0.5


@pytest.mark.parametrize("both", [True, False])
def test_exchange_ends_where_no_single_code_gains(both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovexport.compress.successive.LONGEST_EXCHANGE", 10_000)
    weight, grid, moments = layer("int4_asym", 12, 24)
    curvature = Curvature.of(moments if both else Moments(moments.inputs, None), "w")
    values = exchange(weight, round_successively(weight, grid, curvature), grid, curvature)
    cost, step = curvature.damped.cost(weight - values), grid.spread(grid.step)
    codes = (values / step).round() + grid.spread(grid.zero_point)
    for row in range(12):
        for column in range(24):
            for move in (-1.0, 1.0):
                if grid.lowest <= codes[row, column] + move <= grid.highest:
                    moved = values.clone()
                    moved[row, column] += move * step[row, column]
                    assert curvature.damped.cost(weight - moved) > cost - 1e-5 * cost


def test_rows_that_do_not_hang_together_are_done_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, grid, moments = layer("int4_asym")
    curvature = Curvature.of(Moments(moments.inputs, None), "w")
    values = refined(weight, grid, curvature)[0]
    monkeypatch.setattr("ovexport.compress.successive.BLOCK_ELEMENTS", 1)
    each = [refined(weight[row : row + 1], grid.rows(slice(row, row + 1)), curvature) for row in range(len(weight))]
    again = refined(weight, grid, curvature)
    assert torch.allclose(again[0], torch.cat([one for one, _ in each]))
    assert torch.equal(again[1].step, torch.cat([one.step for _, one in each]))
    costs = [curvature.damped.cost(weight - one) for one in (again[0], values)]
    assert costs[0] <= costs[1] * 1.0001  # a row's fit is kept or not by itself


def test_fitted_steps_cost_less_with_the_same_codes() -> None:
    weight, grid, moments = layer("int4_asym")
    curvature = Curvature.of(moments, "w")
    values = round_successively(weight, grid, curvature)
    fitted = fitted_steps(weight, values, grid, curvature)
    scaled = values / grid.spread(grid.step) * fitted.spread(fitted.step)
    assert curvature.damped.cost(weight - scaled) < curvature.damped.cost(weight - values)
    assert torch.equal(fitted.step, fitted.step.half().float())  # as scales are stored


def test_sums_of_products_are_whole_though_half_of_them_is_computed() -> None:
    total, first, second = torch.zeros(600, 600), torch.randn(50, 600), torch.randn(70, 600)
    add_products(total, first)
    add_products(total, second)
    torch.testing.assert_close(mirrored(total), first.T @ first + second.T @ second, rtol=1e-4, atol=1e-4)


def test_moments_that_are_not_finite_or_nothing_at_all() -> None:
    weight, grid, moments = layer("int4_asym")
    empty = Moments(torch.zeros_like(moments.inputs), torch.zeros_like(moments.outputs))
    assert torch.isfinite(refined(weight, grid, Curvature.of(empty, "w"))[0]).all()
    moments.outputs[0, 0] = float("inf")
    with pytest.raises(UnsupportedModelError, match=r'w: its inputs or slopes .* set compress\.rounding = "nearest"'):
        Curvature.of(moments, "w")


def test_the_slope_is_that_of_the_drawn_tokens_and_vanishes_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    head = Head(torch.randn(50, 8, generator=generator), None, 1.0, 30.0)
    hidden = torch.randn(1, 1, 8, generator=generator).expand(1, 20_000, 8)
    slopes = slope_at_drawn_tokens(head, hidden.contiguous(), generator)[0]
    leaf = hidden[0, :1].clone().requires_grad_(True)
    logits = 30 * torch.tanh(leaf @ head.weight.T / 30)
    each = torch.stack([torch.autograd.grad(-row, leaf, retain_graph=True)[0][0] for row in logits.log_softmax(-1)[0]])
    assert torch.cdist(slopes[:100], each).amin(1).max() < 1e-2
    information = (logits.softmax(-1)[0][:, None, None] * each[:, :, None] * each[:, None, :]).sum(0)
    assert torch.allclose(slopes.T @ slopes / len(slopes), information, atol=0.05 * float(information.max()))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(2, 2000, (4, 24), generator=torch.Generator().manual_seed(1))


def test_moments_are_those_that_autograd_gives(tiny_model: Path, tokens: torch.Tensor) -> None:
    network = load_model(ModelSpec(id=str(tiny_model))).float()
    architecture = Architecture(network)
    matrices = {matrix.name: matrix for matrix in architecture.matrices()}
    found: dict[str, Moments] = {}
    for each in moments_by_block(network, matrices, tokens, torch.Generator().manual_seed(0)):
        found |= each
    assert set(found) == set(matrices)
    generator = torch.Generator().manual_seed(0)
    read: dict[str, torch.Tensor] = {}
    given: dict[str, torch.Tensor] = {}
    for name in matrices:
        module = network.get_submodule(name.removesuffix(".weight"))

        def note(module: nn.Module, inputs: tuple, output: torch.Tensor, name: str = name) -> torch.Tensor:
            read[name] = inputs[0]
            given[name] = output if output.requires_grad else output.requires_grad_(True)
            return given[name]

        module.register_forward_hook(note)
    hidden = network.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    slopes = torch.autograd.grad(
        hidden, list(given.values()), slope_at_drawn_tokens(architecture.head(), hidden.detach(), generator)
    )
    for name, slope in zip(given, slopes, strict=True):
        rows, flat = slope.flatten(0, 1), read[name].flatten(0, 1)
        outputs = rows.T @ rows / tokens.numel()
        if matrices[name].kind == "linear":
            assert torch.allclose(found[name].outputs, outputs, rtol=1e-3, atol=1e-4 * float(outputs.max()))
            inputs = flat.T @ flat / tokens.numel()
        else:  # the tied embedding: slopes at its outputs, and what the head reads
            states = hidden.detach().flatten(0, 1)
            inputs = outputs + states.T @ states / tokens.numel()
            assert found[name].outputs is None
        assert torch.allclose(found[name].inputs, inputs, rtol=1e-3, atol=1e-4 * float(inputs.max()))


def test_hidden_states_beyond_the_memory_lie_in_files(
    tiny_model: Path, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_model(ModelSpec(id=str(tiny_model))).float()
    names = [matrix.name for matrix in Architecture(network).matrices()]

    def gathered() -> list[torch.Tensor]:
        parts = moments_by_block(network, names, tokens, torch.Generator().manual_seed(0))
        return [moments.inputs for part in parts for moments in part.values()]

    expected = gathered()
    monkeypatch.setattr(blocks, "KEPT_BYTES", 0)
    assert all(map(torch.equal, gathered(), expected))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ArtifactError, match=f"^{gettempdir()}: no room for hidden states"):
        gathered()


def test_a_device_that_is_not_there_is_refused_before_any_work() -> None:
    found = [str(one) for one in check(LayerPlan(), CompressSpec(device="cuda"))]
    assert found == (
        [] if torch.cuda.is_available() else ['compress.device="cuda": no CUDA device here; use "auto" or "cpu"']
    )


def test_a_layer_with_very_many_outputs_has_one_side() -> None:
    assert LARGEST_OUTPUTS**2 * 4 == 4 * 2**30


def start(tmp_path: Path, rounding: str) -> float:
    """Validation divergence of a starting point of the bundled model."""
    values = tiny_values(STORYTELLER)
    values["data"] |= {"sequence_length": 64, "train_sequences": 48, "validation_sequences": 4}
    values["compress"] = {"group_size": 64, "rank": 8, "rounding": rounding}
    values["tune"] |= {"steps": 0}
    run = services.run(recipe.parse(values, base=tmp_path, origin="r"), tmp_path / rounding, until="search")
    return float(run.checkpoint.manifest.validation.value)


@pytest.mark.run
def test_the_model_starts_closer_than_with_gptq(tmp_path: Path) -> None:
    assert start(tmp_path, "two_sided") < 0.8 * start(tmp_path, "gptq")


@pytest.mark.run
@pytest.mark.parametrize("mode", ["int4_asym", "int4_sym"])
def test_the_proof_holds_embeddings_included(mode: str, tmp_path: Path, tiny_recipe: recipe.Recipe) -> None:
    values = tiny_values(Path(tiny_recipe.model.id))
    values["compress"] |= {"mode": mode, "rounding": "two_sided"}
    run = services.run(recipe.parse(values, base=tmp_path, origin="r"), tmp_path / "run", until="verify")
    manifest = run.compressed.manifest
    assert set(manifest.replaced_weights) == {each.name for each in manifest.layers}
