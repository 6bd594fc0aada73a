"""Formats of single layers: by patterns of a recipe, and by a policy of a plug-in."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from conftest import REPOSITORY, tiny_values

from ovexport import recipe
from ovexport.artifacts import Checkpoint
from ovexport.errors import PlugInError, RecipeError
from ovexport.pipeline import services
from ovexport.recipe import CompressSpec, LayerRule, section
from ovexport.reports import VerificationReport
from ovexport.storage.records import read_record
from ovexport.weights.layer import LayerFormat, WeightMatrix
from ovexport.weights.plan import examine_layers, plan_layers
from ovexport.weights.policy import LayerPolicy, RecipePolicy, format_layer, layer_policies

EMBEDDING = WeightMatrix(name="model.embed_tokens.weight", kind="embedding", out_features=2048, in_features=64)
GATE = WeightMatrix(name="model.layers.0.mlp.gate_proj.weight", kind="linear", out_features=172, in_features=64)
DOWN = WeightMatrix(name="model.layers.0.mlp.down_proj.weight", kind="linear", out_features=64, in_features=172)
MATRICES = (EMBEDDING, GATE, DOWN)


def formats(*rules: dict, **keys: object) -> dict[str, tuple[str, int, int]]:
    """Mode, group size and rank of each matrix, by the last part of its name."""
    spec = CompressSpec(**{"group_size": 4, "rank": 8} | keys, layers=tuple(LayerRule(**rule) for rule in rules))
    return {
        layer.name.split(".")[-2]: (layer.mode, layer.group_size, layer.rank) for layer in plan_layers(MATRICES, spec)
    }


def test_keys_that_a_table_leaves_out_come_from_the_section() -> None:
    assert formats({"pattern": "*.gate_proj", "group_size": 32}) == {
        "embed_tokens": ("int8_asym", 64, 0),
        "gate_proj": ("int4_asym", 32, 8),
        "down_proj": ("int4_asym", 4, 8),
    }
    assert formats({"pattern": "*.gate_proj", "rank": 2})["gate_proj"] == ("int4_asym", 4, 2)
    assert formats({"pattern": "*.gate_proj", "mode": "int4_sym"})["gate_proj"] == ("int4_sym", 4, 8)
    assert formats({"pattern": "*.gate_proj", "group_size": -1})["gate_proj"] == ("int4_asym", 64, 8)


def test_whole_layers_take_8_bits_or_stay_in_floating_point() -> None:
    made = formats(
        {"pattern": ["*.gate_proj", "*embed*"], "mode": "float"}, {"pattern": "*.down_proj", "mode": "int8_asym"}
    )
    assert made == {
        "embed_tokens": ("float", 64, 0), "gate_proj": ("float", 64, 0), "down_proj": ("int8_asym", 172, 0),
    }  # fmt: skip


def test_the_first_table_that_matches_is_used_and_ignored_goes_before_all() -> None:
    rules = {"pattern": "*.gate_proj", "mode": "int4_sym"}, {"pattern": "model.layers.*", "mode": "int8_asym"}
    assert formats(*rules)["gate_proj"] == ("int4_sym", 4, 8)
    assert formats(*rules)["down_proj"] == ("int8_asym", 172, 0)
    assert formats(*rules, ignored=("*.gate_proj",))["gate_proj"] == ("float", 64, 0)


def test_a_group_size_of_a_table_has_the_fallback_of_the_section() -> None:
    rule = {"pattern": "*.down_proj", "group_size": 64}
    assert formats(rule, fallback="smaller_group")["down_proj"] == ("int4_asym", 4, 8)
    assert formats(rule, fallback="int8")["down_proj"] == ("int8_asym", 172, 0)
    with pytest.raises(
        RecipeError, match=r"compress.layers.0.group_size=64 does not divide in_features=172 of model.la"
    ):
        formats(rule)
    with pytest.raises(
        RecipeError, match=r"compress.layers.0.group_size=43 for in_features=172 .* computes INT4 wrongly"
    ):
        formats({"pattern": "*.down_proj", "group_size": 43})


def test_a_pattern_that_matches_nothing_is_named_with_examples() -> None:
    with pytest.raises(RecipeError) as caught:
        formats({"pattern": "*.gate_proj", "rank": 4}, {"pattern": ("*.down_proj", "*.dwn_proj"), "rank": 4})
    assert str(caught.value).startswith(
        "compress.layers.1.pattern='*.dwn_proj': no layer has such a name; they read like model.embed_tokens, model.la"
    )


def test_an_embedding_takes_4_bits_where_a_mode_says_so_and_no_adapter() -> None:
    assert formats({"pattern": "*", "mode": "int4_sym"}) == {
        "embed_tokens": ("int4_sym", 4, 0),
        "gate_proj": ("int4_sym", 4, 8),
        "down_proj": ("int4_sym", 4, 8),
    }
    assert formats({"pattern": "*", "mode": "int4_asym", "group_size": 64}, fallback="int8")["embed_tokens"] == (
        ("int4_asym", 64, 0)
    )
    for rule in ({"rank": 4}, {"group_size": 32}, {"mode": "int4_sym", "rank": 4}):
        with pytest.raises(
            RecipeError, match=r"compress.layers.0: matches model.embed_tokens, no Linear layer, so it takes 8"
        ):
            formats({"pattern": "*", **rule}, fallback="int8")
    rules = (LayerRule(pattern="*", rank=4),)
    assert examine_layers(MATRICES, CompressSpec(group_size=4, layers=rules)).unsuitable == {EMBEDDING.name}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layers": {"pattern": "*", "rank": 4}}, "layers: one table; write [[compress.layers]] in double brackets"),
        ({"layers": [{"pattern": "*"}]}, "layers.0: sets nothing; give a mode, a group_size or a rank"),
        ({"layers": [{"rank": 4}]}, "layers.0.pattern: missing; add it"),
        ({"layers": [{"pattern": [], "rank": 4}]}, "layers.0.pattern"),
        ({"layers": [{"pattern": "*", "mode": "float", "rank": 4}]}, 'mode="float" takes no group_size and no rank'),
        ({"layers": [{"pattern": "*", "mode": "int8_asym", "group_size": 4}]}, 'mode="int8_asym" takes no group_size'),
        ({"layers": [{"pattern": "*", "mode": "nf4"}]}, "layers.0.mode='nf4'"),
        ({"layers": [{"pattern": "*", "group_size": 0}]}, "layers.0.group_size: 0 channels; give a divisor"),
        ({"layers": [{"pattern": "*", "bits": 4}]}, "layers.0.bits: no such key"),
        (
            {"layers": [{"pattern": "*", "rank": 4}], "format": "fq_lora_nls", "rank_space": [8, 4]},
            "layers.0.rank: with rank_space every adapter has its ranks; remove the key",
        ),
    ],
)
def test_a_table_that_can_not_be_carried_out_is_refused(keys: dict, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        section(CompressSpec, **keys)
    assert message in str(caught.value)


def test_what_leaves_nothing_to_compress_is_named() -> None:
    with pytest.raises(RecipeError, match=r"^compress.layers leaves nothing to compress; name fewer layers"):
        formats({"pattern": "*", "mode": "float"})


def test_a_recipe_with_tables_is_written_and_read_again(tmp_path: Path) -> None:
    values = tiny_values(tmp_path) | {
        "compress": {"layers": [{"pattern": "*.down_proj", "mode": "int8_asym"}, {"pattern": ["a", "b"], "rank": 2}]}
    }
    resolved = recipe.parse(values, base=tmp_path, origin="mixed")
    (tmp_path / "recipe.toml").write_text(recipe.dump(resolved))
    assert recipe.load(tmp_path / "recipe.toml") == resolved


@pytest.fixture
def registered() -> Iterator[Callable[[Callable], Callable]]:
    """Registers a layer policy for one test."""
    before = layer_policies.names
    yield layer_policies.register("strange")
    if layer_policies.names != before:
        layer_policies.unregister("strange")


def test_a_policy_of_a_notebook_decides_beside_the_recipe(registered) -> None:
    def coarse_gates(spec: CompressSpec, matrices: Sequence[WeightMatrix]) -> LayerPolicy:
        ours = RecipePolicy(spec, matrices)
        return lambda one: format_layer(one, "int4_sym", group_size=32, rank=2) if "gate" in one.name else ours(one)

    registered(coarse_gates)
    rule = {"pattern": "*.down_proj", "mode": "int8_asym"}
    made = formats(rule, layer_policy="strange")
    assert (made["gate_proj"], made["down_proj"]) == (("int4_sym", 32, 2), ("int8_asym", 172, 0))
    assert formats(rule, layer_policy="strange", ignored=("*.gate_proj",))["gate_proj"] == ("float", 64, 0)


def changed(**values: object) -> Callable[[WeightMatrix], LayerFormat]:
    return lambda matrix: format_layer(matrix, "int4_asym", group_size=4, rank=4).model_copy(update=values)


@pytest.mark.parametrize(
    ("policy", "keys", "message"),
    [
        (lambda matrix: None, {}, "its format of model.embed_tokens is a NoneType, not a LayerFormat"),
        (lambda matrix: format_layer(GATE, "float"), {}, "is another matrix's; make it with format_layer"),
        (
            changed(),
            {},
            "of model.embed_tokens has rank=4; what is no Linear layer takes no adapter",
        ),
        (changed(group_size=43), {"ignored": ("*embed*",)}, "has group_size=43, which does not suit in_features=64"),
        (changed(rank=65), {"ignored": ("*embed*",)}, "has rank=65, which is not from 0 to 64"),
        (changed(mode="int8_asym"), {}, "has mode int8_asym, which takes no group_size and no rank"),
        (
            changed(mode="int8_sym"),
            {},
            "has mode int8_sym; the modes are int4_asym, int4_asym_f16zp, int4_sym, int8_asym, float",
        ),
        (
            changed(),
            {"ignored": ("*embed*",), "format": "fq_lora_nls", "rank_space": (8, 4)},
            "has rank=4, and the largest of rank_space is 8",
        ),
        (lambda matrix: 1 / 0, {}, "failed: ZeroDivisionError: division by zero (test_policy.py, line "),
    ],
)
def test_a_policy_that_gives_no_format_is_named(registered, policy, keys: dict, message: str) -> None:
    registered(lambda spec, matrices: policy)
    with pytest.raises(PlugInError) as caught:
        formats(**keys, layer_policy="strange")
    assert str(caught.value).startswith("plug-in 'strange' of module test_policy: ")
    assert message in str(caught.value)


def test_an_unknown_policy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        RecipeError, match=r"compress.layer_policy='mine': no such layer policy; the known ones are recipe"
    ):
        formats(layer_policy="mine")


@pytest.mark.run
def test_a_model_of_several_modes_is_tuned_and_proven(tiny_model: Path, tmp_path: Path) -> None:
    values = tiny_values(tiny_model)
    values["compress"]["layers"] = [
        {"pattern": "model.layers.0.mlp.up_proj", "mode": "float"},
        {"pattern": "*.down_proj", "mode": "int8_asym"},
        {"pattern": ["*.q_proj", "*.k_proj"], "mode": "int4_sym", "group_size": 16, "rank": 4},
        {"pattern": "*.v_proj", "group_size": -1},
    ]
    values["tune"] |= {"steps": 20, "learning_rate": 2e-3, "warmup_fraction": 0.0}
    run = services.run(recipe.parse(values, base=REPOSITORY, origin="mixed"), tmp_path / "run", until="verify")
    report = read_record(run.path / "verification.json", VerificationReport)
    assert report.passed
    assert (report.summary.packed_int4, report.summary.packed_int8, report.summary.float) == (11, 3, 1)
    assert tuned(run.checkpoint) != tuned(run.compressed)
    made = {layer.name: (layer.mode, layer.group_size, layer.rank) for layer in run.checkpoint.manifest.layers}
    assert made["model.layers.1.self_attn.q_proj.weight"] == ("int4_sym", 16, 4)
    assert made["model.layers.1.self_attn.v_proj.weight"] == ("int4_asym", 64, 8)
    assert made["model.layers.1.mlp.up_proj.weight"] == ("int4_asym", 32, 8)


def tuned(checkpoint: Checkpoint) -> set[tuple[str, str]]:
    """Digests of the codes of layers that are tuned."""
    manifest = checkpoint.manifest
    return {(layer.name, manifest.digests[layer.name].codes) for layer in manifest.packed if layer.rank}
