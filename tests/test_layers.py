import pytest

from ovexport.errors import RecipeError
from ovexport.layers import WeightMatrix, plan_layers
from ovexport.recipe import CompressSpec

DOWN = WeightMatrix(name="model.layers.0.mlp.down_proj.weight", kind="linear", out_features=64, in_features=172)
GATE = WeightMatrix(name="model.layers.0.mlp.gate_proj.weight", kind="linear", out_features=172, in_features=64)
EMBEDDING = WeightMatrix(name="model.embed_tokens.weight", kind="embedding", out_features=512, in_features=64)


def test_embeddings_are_int8_and_linears_int4() -> None:
    embedding, gate = plan_layers([EMBEDDING, GATE], CompressSpec(group_size=32, rank=8))
    assert (embedding.mode, embedding.group_size, embedding.rank) == ("int8_asym", 64, 0)
    assert (gate.mode, gate.group_size, gate.rank, gate.note) == ("int4_asym", 32, 8, None)


def test_a_group_size_that_does_not_divide_is_an_error_with_the_cure() -> None:
    with pytest.raises(RecipeError) as caught:
        plan_layers([GATE, DOWN], CompressSpec(group_size=64))
    assert "compress.group_size=64 does not divide in_features=172 of model.layers.0.mlp.down_proj" in str(caught.value)
    assert "4 or 43 or 86" in str(caught.value)


@pytest.mark.parametrize(
    ("fallback", "mode", "group_size"),
    [("smaller_group", "int4_asym", 43), ("per_channel", "int4_asym", 172), ("int8", "int8_asym", 172)],
)
def test_a_fallback_is_taken_and_said(fallback: str, mode: str, group_size: int) -> None:
    (layer,) = plan_layers([DOWN], CompressSpec(group_size=64, fallback=fallback, rank=4))
    assert (layer.mode, layer.group_size) == (mode, group_size)
    assert "group size 64 does not divide 172" in (layer.note or "")


def test_a_smaller_group_that_is_not_there_is_still_an_error() -> None:
    prime = WeightMatrix(name="x.weight", kind="linear", out_features=8, in_features=67)
    with pytest.raises(RecipeError, match="in_features=67"):
        plan_layers([prime], CompressSpec(group_size=64, fallback="smaller_group"))


def test_minus_one_is_one_scale_per_channel() -> None:
    (layer,) = plan_layers([DOWN], CompressSpec(group_size=-1, rank=4))
    assert (layer.group_size, layer.groups) == (172, 1)


def test_a_rank_above_the_layers_side_is_clamped_and_said() -> None:
    (layer,) = plan_layers([DOWN], CompressSpec(group_size=43, rank=256))
    assert layer.rank == 64
    assert layer.note == "rank 256 clamped to 64"


def test_ignored_layers_stay_float_and_a_pattern_that_matches_nothing_is_refused() -> None:
    gate, down = plan_layers([GATE, DOWN], CompressSpec(group_size=32, ignored=("*.down_proj",)))
    assert (gate.mode, down.mode) == ("int4_asym", "float")
    with pytest.raises(RecipeError, match=r"no layer has such a name; they read like model\.layers\.0\.mlp\.gate_proj"):
        plan_layers([GATE, DOWN], CompressSpec(ignored=("*.dwn_proj",)))


def test_weight_bytes_count_codes_scales_and_zero_points() -> None:
    (layer,) = plan_layers([GATE], CompressSpec(group_size=32, rank=8))
    assert layer.weight_bytes == 172 * 64 // 2 + 172 * 2 * 2 + 172 * 2 // 2
