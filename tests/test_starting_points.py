"""Starting points: chosen by name or by the three keys, and what is refused of one that is not ours."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ovexport.artifacts import Checkpoint, PreparedData
from ovexport.compress import Start, StartingPoint, check, chosen, compress, plug_ins, starting_points
from ovexport.errors import PlugInError, RecipeError
from ovexport.recipe import CompressSpec, LayerRule, ModelSpec, section
from ovexport.storage.tensorfile import write_tensors
from ovexport.weights.plan import LayerPlan

Compress = Callable[..., Checkpoint]


@pytest.fixture
def compressed(tiny_model: Path, tmp_path: Path) -> Compress:
    """Compresses the tiny model with some keys of the section."""
    tokens = np.random.default_rng(0).integers(2, 2048, (8, 32)).astype(np.int32)
    write_tensors({"train": tokens}, tmp_path / "tokens.safetensors")

    def compress_tiny(**keys: object) -> Checkpoint:
        spec = CompressSpec(group_size=32, rank=4, calibration_sequences=4, **keys)
        return compress(
            ModelSpec(id=str(tiny_model)), spec, PreparedData(tmp_path), 0, tmp_path / "-".join(["checkpoint", *keys])
        )

    return compress_tiny


@pytest.fixture
def registered() -> Iterator[Callable[[type], type]]:
    """Registers a starting point for one test."""
    before = starting_points.names
    yield starting_points.register("strange")
    if starting_points.names != before:
        starting_points.unregister("strange")


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({}, ["rounding", "two_sided"]),
        ({"rounding": "nearest"}, ["rounding"]),
        ({"starting_point": "rounding"}, ["rounding"]),
        ({"starting_point": "gptq"}, ["rounding", "gptq"]),
        ({"awq": True, "rounding": "nearest"}, ["rounding", "awq"]),
        ({"scale_estimation": True, "rounding": "gptq"}, ["rounding", "scale_estimation", "gptq"]),
        ({"awq": True, "scale_estimation": True}, ["rounding", "awq_scale_estimation", "two_sided"]),
    ],
)
def test_a_recipe_chooses_starting_points_by_name_or_by_key(keys: dict, names: list[str]) -> None:
    assert [registered.name for registered in chosen(CompressSpec(**keys))] == names
    assert set(plug_ins(CompressSpec(**keys)).values()) == {None}


def test_a_name_gives_the_codes_that_its_key_gives(compressed: Compress) -> None:
    by_name, by_key = compressed(starting_point="gptq"), compressed(rounding="gptq")
    assert by_name.manifest.digests == by_key.manifest.digests
    assert by_name.manifest.digests != compressed(rounding="nearest").manifest.digests


def test_a_name_and_a_key_are_refused_together() -> None:
    with pytest.raises(
        RecipeError, match='starting_point="gptq" takes the place of awq, scale_estimation and rounding'
    ):
        section(CompressSpec, starting_point="gptq", awq=True)


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    (problem,) = check(LayerPlan(), CompressSpec(starting_point="gtpq"))
    assert isinstance(problem, RecipeError)
    assert re.search(r"no such starting point; the known ones are .*gptq", str(problem))


def test_a_starting_point_of_a_notebook_sets_weights_and_grids(compressed: Compress, registered) -> None:
    class Halves(StartingPoint):
        replaces_weights = True

        def apply(self, start: Start) -> None:
            for name, quantizer in start.quantizers.items():
                start.replaced_weights[name] = start.weight(name).float() / 2
                quantizer.initialize(start.replaced_weights[name], start.generator)

    registered(Halves)
    plain, halves = compressed(), compressed(starting_point="strange")
    name = plain.manifest.packed[-1].name
    assert halves.manifest.digests[name].scale != plain.manifest.digests[name].scale
    assert name in halves.manifest.replaced_weights
    assert plug_ins(CompressSpec(starting_point="strange"))["starting_point"].startswith("module test_starting_points ")


def writes_to_the_model(start: Start) -> None:
    next(iter(start.weights.values())).zero_()


def replaces_by_another_shape(start: Start) -> None:
    start.replaced_weights[next(iter(start.weights))] = torch.zeros(2, 2)


def replaces_what_is_no_layer(start: Start) -> None:
    start.replaced_weights["model.norm.weight"] = torch.zeros(2, 2)


def leaves_grids_that_are_not_finite(start: Start) -> None:
    with torch.no_grad():
        next(iter(start.quantizers.values())).input_range.fill_(float("nan"))


def fails(start: Start) -> None:
    raise ZeroDivisionError("by hand")


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (writes_to_the_model, "wrote to the base model's weights of model.embed_tokens.weight"),
        (replaces_by_another_shape, r"by a tensor that is not \(2048, 64\), float32 and finite"),
        (replaces_what_is_no_layer, "replaced the weights of model.norm.weight, which is no layer"),
        (leaves_grids_that_are_not_finite, "left input_range of .* with values that are not finite"),
        (fails, r"failed: ZeroDivisionError: by hand \(test_starting_points.py, line"),
    ],
)
def test_a_plug_in_that_leaves_no_starting_point_is_named(compressed, registered, apply, message: str) -> None:
    registered(type("Strange", (StartingPoint,), {"apply": lambda self, start: apply(start), "__module__": __name__}))
    with pytest.raises(PlugInError, match=f"plug-in 'strange' of module test_starting_points.*{message}"):
        compressed(starting_point="strange")


@pytest.mark.parametrize(
    "keys",
    [
        {"awq": True, "rounding": "nearest"},
        {"rounding": "gptq"},
        {"scale_estimation": True, "rounding": "gptq"},
        {"rounding": "two_sided"},
    ],
)
def test_layers_with_a_format_of_their_own_start_too(compressed: Compress, keys: dict) -> None:
    layers = (
        LayerRule(pattern="*.down_proj", mode="int8_asym"),
        LayerRule(pattern=("*.q_proj", "*.k_proj"), mode="int4_sym"),
        LayerRule(pattern="*.v_proj", mode="float"),
        LayerRule(pattern="*.o_proj", group_size=-1, rank=2),
    )
    plain, start = compressed(layers=layers, rounding="nearest").manifest, compressed(layers=layers, **keys).manifest
    moved = {name.split(".")[-2] for name in plain.digests if plain.digests[name] != start.digests[name]}
    replaced = {name.split(".")[-2] for name in start.replaced_weights}
    if keys["rounding"] == "two_sided":
        assert moved == {"embed_tokens", "down_proj", "q_proj", "k_proj", "o_proj", "gate_proj", "up_proj"}
        assert replaced == moved
    elif keys["rounding"] == "gptq":
        assert moved >= {"q_proj", "k_proj", "o_proj", "gate_proj", "up_proj"}
        assert replaced == {"q_proj", "k_proj", "o_proj", "gate_proj", "up_proj"}
    else:
        assert moved >= {"gate_proj", "up_proj"}
